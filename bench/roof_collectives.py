"""Collectives through shared memory against the same over gloo, at 2 and 4 ranks of this host."""

import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from bench.measure import Row, row
from bench.rank_processes import on_ranks
from engine.parallel.distributed import GlooCollectives
from engine.parallel.shared_memory import SharedMemoryCollectives

NUM_RANKS = (2, 4)
NUM_BYTES = (1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20)
NUM_ROWS = 8
_TIMEOUT_S = 60.0
_CALLS = {False: 60, True: 5}

Samples = dict[str, tuple[list[float], list[float]]]
"""By case: medians in µs through shared memory and over gloo, one each for every repetition."""


class _Collectives(Protocol):
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None: ...


def run(num_repetitions: int, quick: bool) -> list[Row]:
    rows = []
    for num_ranks in NUM_RANKS:
        samples = on_ranks(num_ranks, 600.0, measure_rank, num_ranks, num_repetitions, _CALLS[quick])[0]
        for case, (ours, theirs) in samples.items():
            name = f"collectives, {num_ranks} ranks"
            rows.append(row(name, case, "µs", ours, theirs, "lower", "bfloat16; ÷ gloo; medians of each repetition"))
    return rows


def measure_rank(rank: int, store: dist.Store, num_ranks: int, num_repetitions: int, num_calls: int) -> Samples:
    """One rank's part."""
    shared = SharedMemoryCollectives.join(store, rank, num_ranks, "127.0.0.1", _TIMEOUT_S)
    if shared is None:
        return {}  # built without the native library: gloo is all there is
    group = dist.ProcessGroupGloo(
        dist.PrefixStore("gloo", store), rank, num_ranks, datetime.timedelta(seconds=_TIMEOUT_S)
    )
    gloo = GlooCollectives(group, rank, num_ranks, _TIMEOUT_S)
    samples: Samples = {}
    for num_bytes in NUM_BYTES:
        tensor = torch.ones(NUM_ROWS, num_bytes // 2 // NUM_ROWS, dtype=torch.bfloat16)
        calls: dict[str, Callable[[_Collectives], object]] = {
            f"all-reduce, {num_bytes >> 10} KiB": partial(_all_reduce, tensor=tensor),
            f"gather of {NUM_ROWS} rows, {num_bytes >> 10} KiB a rank": partial(_gather, tensor=tensor),
        }
        for case, call in calls.items():
            samples[case] = _in_turns(shared, gloo, call, num_repetitions, num_calls)
    return samples


def _all_reduce(collectives: _Collectives, tensor: torch.Tensor) -> None:
    collectives.all_reduce(tensor)


def _gather(collectives: _Collectives, tensor: torch.Tensor) -> None:
    collectives.gather_last_dim(tensor)


def _in_turns(
    shared: _Collectives,
    gloo: _Collectives,
    call: Callable[[_Collectives], object],
    num_repetitions: int,
    num_calls: int,
) -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    for _ in range(num_repetitions):
        ours.append(_median_us(lambda: call(shared), num_calls))
        theirs.append(_median_us(lambda: call(gloo), num_calls))
    return ours, theirs


def _median_us(call: Callable[[], object], num_calls: int) -> float:
    times_s = []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s) * 1e6
