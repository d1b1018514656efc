"""The linters, the type checker, the import contracts and the generated code, each as one test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment: ``command[0]`` is a script beside the interpreter."""
    tool = Path(sys.executable).with_name(command[0])
    return subprocess.run([str(tool), *command[1:]], cwd=cwd, capture_output=True, text=True, check=False)


def _expect_clean(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


def test_ruff_finds_nothing() -> None:
    _expect_clean(_run("ruff", "check", "--output-format", "concise"))


def test_code_is_formatted() -> None:
    _expect_clean(_run("ruff", "format", "--check"))


@pytest.mark.timeout(400)
def test_types_are_strict_and_clean() -> None:
    _expect_clean(_run("mypy"))


def test_import_contracts_hold() -> None:
    _expect_clean(_run("lint-imports", "--no-logo"))


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        (
            "engine/scheduler/planted.py",
            "import torch",
            "the scheduler, the wire types and the front end are torch-free",
        ),
        ("engine/layers/planted.py", "import grpc", "engine knows no cluster, no Ray, no network API"),
        ("engine/parallel/planted.py", "import engine.executor", "engine layers point downwards"),
        ("cluster/router/planted.py", "import cluster.frontend", "cluster layers point downwards"),
        ("cluster/replica/planted.py", "import ray", "Ray lives in few files"),
        (
            "cluster/frontend/planted.py",
            "from cluster.rpc.generated.remuda.v1 import common_pb2",
            "generated protobuf code stays with the ends of gRPC calls",
        ),
    ],
)
def test_contracts_catch_a_planted_violation(module: str, line: str, contract: str, tmp_path: Path) -> None:
    for top in ("cluster", "engine"):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / module).write_text(line + "\n")
    # The tool is given the copy as its root: the current directory comes first on its path.
    result = _run("lint-imports", "--no-logo", "--no-cache", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in " ".join(result.stdout.split())


def test_generated_protobuf_code_is_up_to_date() -> None:
    _expect_clean(_run("python", "protos/generate.py", "--check"))
