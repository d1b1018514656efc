"""``make bench``, ``bench-roof`` and ``bench-peers`` run to their end and write what they print."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, module: str = "run", timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_an_unknown_benchmark_is_refused_by_name(tmp_path: Path) -> None:
    done = bench("--only", "host-step,speed", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert "--only speed: there are host-step, streaming, idle, end-to-end" in done.stderr
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_benchmark_gives_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = checked_rows(out)
    cases = [row["case"] for row in rows]
    parts = ("1 running", "64 running", "256 running, critical path", "leader → client", "→ SSE", "→ gRPC")
    for part in (*parts, "our processes in all", "concurrency 8"):
        assert any(part in case for case in cases), f"no figure of {part}"
        assert part in done.stdout
    due = [row for row in rows if "steps due at 7 × the rate of grpc.aio" in row["benchmark"]]
    assert sorted((row["unit"], row["case"].split(" → ")[-1].split(" (")[0]) for row in due) == [
        *[
            ("ms added, p99", f"{path}, {when}")
            for path in ("SSE", "gRPC")
            for when in ("while all run", "with the beginning")
        ],
        ("tokens/s", "SSE"),
        ("tokens/s", "gRPC"),
    ]


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_roof_of_everything_is_measured(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=4096)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "roof.json"
    done = bench("--quick", "--model", str(tmp_path / "dense"), "--out", str(out), module="roof")
    assert done.returncode == 0, done.stderr[-4000:]
    cases = {(row["benchmark"], row["case"]) for row in checked_rows(out)}
    benchmarks = {benchmark for benchmark, _ in cases}
    assert {"decode, tp=2", "prefill", "collectives, 2 ranks", "collectives, 4 ranks"} <= benchmarks
    assert sum(benchmark == "decode, tp=2" for benchmark, _ in cases) == 3


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    done = bench("--model", str(tmp_path / "none"), module="peers")
    assert (done.returncode, "make bench-models builds it" in done.stderr) == (2, True)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_peers_take_turns(tmp_path: Path) -> None:
    tiny = str(ROOT / "engine" / "assets" / "remuda-tiny")
    serve = f"{Path(sys.executable).parent / 'remuda'} serve {{model}} --served-model-name {{name}} --port {{port}}"
    out = tmp_path / "peers.json"
    arguments = ["--model", tiny, "--tp", "1", "--cases", "c1,shared2", "--repetitions", "1", "--out", str(out)]
    done = bench(*arguments, "--peer", f"again={serve} --grpc-port 0", module="peers")
    assert done.returncode == 0, done.stderr[-4000:]
    benchmarks = {row["benchmark"] for row in checked_rows(out)}
    ours = "remuda-tiny: output, remuda (bfloat16) against"
    assert benchmarks >= {f"{ours} again (precision not known)", f"{ours} transformers (bfloat16)"}
    servers = json.loads(out.read_text())["machine"]["servers"]
    assert "remuda serve remuda-tiny" in servers["remuda"]["command"]
    assert all(each["version"] for each in servers.values())
    assert {row["case"] for row in checked_rows(out)} == {"c1", "shared2"}


def checked_rows(out: Path) -> list[dict[str, Any]]:
    """All figures are numbers that can be."""
    rows = json.loads(out.read_text())["rows"]
    assert isinstance(rows, list)
    for row in rows:
        for spread in (row["ours"], row["reference"], row["ratio"]):
            assert math.isfinite(spread["median"]) and spread["low"] <= spread["median"] <= spread["high"]
            assert spread["median"] > 0
    return rows
