"""The committed protobuf modules are what protos/ gives."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_modules_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_proto_is_noticed(tmp_path: Path) -> None:
    for name in ("protos", "cluster/rpc/generated"):
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".pyi", ".proto"):
                copy = tmp_path / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    proto = tmp_path / "protos/remuda/v1/admin.proto"
    proto.write_text(proto.read_text().replace("string version = 5;", "string version = 1000;"))
    (tmp_path / "cluster/rpc/generated/stale_pb2.py").write_text("")
    done = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "admin_pb2.py" in done.stdout and "stale_pb2.py" in done.stdout
    assert "common_pb2" not in done.stdout
