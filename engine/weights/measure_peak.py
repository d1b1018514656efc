"""Measure how much memory a rank needs to load its shard: ``python -m engine.weights.measure_peak DIRECTORY --tp 2``.

For every rank two fresh processes are started. Both import the engine, join their gang and build the model's shapes;
one then allocates and loads its shard, the other stops there ("an empty checkpoint"). The difference of their VmHWM
(the kernel's high-water mark of resident memory), divided by the shard's bytes, is printed for each rank. Exit status 1
where it is above ``--limit``.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.weights.ledger import shard_bytes
from engine.weights.load_check import HostShare
from engine.weights.loader import load_weights

_TIMEOUT_S = 600.0


def peak_resident_bytes() -> int:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert match, "the kernel gives no VmHWM"
    return int(match[1]) * 1024


def measure(directory: str, parallel: ParallelConfig, dtype: Dtype) -> list[dict[str, int | float]]:
    """For each rank: peak bytes with and without loading, the shard's bytes, and (with - without) / shard."""
    config = ModelConfig.from_directory(directory)
    loaded = _peaks(directory, parallel, dtype, load=True)
    idle = _peaks(directory, parallel, dtype, load=False)
    results: list[dict[str, int | float]] = []
    for rank in range(parallel.num_ranks):
        shard = shard_bytes(config, parallel, rank, dtype).total
        results.append(
            {
                "rank": rank,
                "peak_bytes": loaded[rank],
                "empty_peak_bytes": idle[rank],
                "shard_bytes": shard,
                "ratio": round((loaded[rank] - idle[rank]) / shard, 4),
            }
        )
    return results


def _peaks(directory: str, parallel: ParallelConfig, dtype: Dtype, load: bool) -> list[int]:
    """VmHWM of each rank of one gang."""
    with tempfile.TemporaryDirectory(prefix="remuda-peak-") as scratch:
        command = [sys.executable, "-m", "engine.weights.measure_peak", directory, "--dtype", dtype]
        command += ["--tp", str(parallel.tp), "--ep", str(parallel.ep), "--store", str(Path(scratch) / "store")]
        command += ["--load"] if load else []
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank in range(parallel.num_ranks):
                ranks.append(subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True))
            outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    failed = [rank for rank, process in enumerate(ranks) if process.returncode != 0]
    if failed:
        raise SystemExit(f"ranks {failed} failed; their errors are above")
    return [int(output) for output in outputs]


def _run_rank(arguments: argparse.Namespace, parallel: ParallelConfig) -> None:
    """One rank: prints its VmHWM."""
    torch.set_num_threads(1)
    config = ModelConfig.from_directory(arguments.directory)
    store = dist.FileStore(arguments.store, parallel.num_ranks)
    mesh = init_distributed(parallel, arguments.rank, store, torch.device("cpu"))
    build_model(config, mesh, arguments.dtype, torch.device("meta"))
    if arguments.load:
        model = build_model(config, mesh, arguments.dtype, torch.device("cpu"))
        load_weights(model, arguments.directory, share=HostShare(arguments.rank, parallel.num_ranks))
    peak = peak_resident_bytes()
    # Nobody leaves while another still needs the connection.
    mesh.tp.all_reduce(torch.ones(1))
    print(peak)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.weights.measure_peak", description=__doc__)
    parser.add_argument("directory", help="a checkpoint in Hugging Face form")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks (default 2)")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks (default 1)")
    parser.add_argument("--dtype", type=Dtype, help="default: the checkpoint's own")
    parser.add_argument("--limit", type=float, default=1.10, help="largest ratio that passes (default 1.10)")
    for hidden in ("--rank", "--store"):
        parser.add_argument(hidden, type=int if hidden == "--rank" else str, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    parallel = ParallelConfig(tp=arguments.tp, ep=arguments.ep)
    if arguments.rank is not None:
        _run_rank(arguments, parallel)
        return 0
    dtype = arguments.dtype or ModelConfig.from_directory(arguments.directory).dtype
    results = measure(arguments.directory, parallel, dtype)
    for result in results:
        print(json.dumps(result))
    worst = max(result["ratio"] for result in results)
    print(f"largest (VmHWM - VmHWM with an empty checkpoint) / shard: {worst} (limit {arguments.limit})")
    return 0 if worst <= arguments.limit else 1


if __name__ == "__main__":
    raise SystemExit(main())
