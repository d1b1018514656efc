"""``make bench`` runs to its end and writes what it prints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_an_unknown_benchmark_is_refused_by_name(tmp_path: Path) -> None:
    done = bench("--only", "host-step,speed", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert "--only speed: there are host-step, streaming, end-to-end" in done.stderr
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_benchmark_gives_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())["rows"]
    cases = [row["case"] for row in rows]
    for part in ("1 running", "64 running", "256 running", "leader → client", "→ SSE", "→ gRPC", "concurrency 8"):
        assert any(part in case for case in cases), f"no figure of {part}"
        assert part in done.stdout
    for row in rows:
        for spread in (row["ours"], row["reference"], row["ratio"]):
            assert math.isfinite(spread["median"]) and spread["low"] <= spread["median"] <= spread["high"]
            assert spread["median"] > 0
