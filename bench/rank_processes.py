"""Runs a function on several processes at once that meet through a store, as the ranks of a gang do."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")


def on_ranks(
    num_ranks: int,
    timeout_s: float,
    function: Callable[Concatenate[int, dist.Store, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """``function(rank, store, …)`` on each rank, with one torch thread; results by rank. Raises what a rank raised."""
    with tempfile.TemporaryDirectory(prefix="remuda-bench-") as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_ranks, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            path = str(Path(folder, "store"))
            started = [
                pool.submit(_run, function, rank, num_ranks, path, *args, **kwargs)  # type: ignore[arg-type]
                for rank in range(num_ranks)
            ]
            return [each.result(timeout_s) for each in started]


def _run(
    function: Callable[Concatenate[int, dist.Store, P], T],
    rank: int,
    num_ranks: int,
    path: str,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    return function(rank, dist.FileStore(path, num_ranks), *args, **kwargs)
