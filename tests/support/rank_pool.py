"""Runs a function on several ranks, each a process of its own, and brings back what they returned.

Ranks are forked from multiprocessing's fork server, a process with one thread that has imported torch and the engine
once, so that starting four of them takes about a tenth of a second whatever the test process itself has loaded. None is
used twice: what one gang leaves in a process cannot hide in the next.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = [
    "torch",
    "numpy",
    "engine.engine",
    "engine.executor.rank_startup",
    "engine.executor.worker",
    "engine.models.llama",
    "engine.models.llama4",
    "tests.layouts.run",
    "tests.support.rank_pool",
]
_CLONE_NEWNET = 0x40000000
_AFTERMATH_S = 1.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


@dataclass(frozen=True)
class RankContext:
    """What a rank is told: its number, how many there are, and a store through which they can meet."""

    rank: int
    num_ranks: int
    store: dist.Store


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 60.0,
    allow_errors: bool = False,
    networks: Sequence[Path] = (),
) -> list[Any]:
    """Call ``function(RankContext, *args)`` on every rank and return the results in order of ranks.

    ``function`` and everything that it takes and returns must be picklable; return arrays, not tensors, which torch
    would leave in the shared memory of a process that is gone. With ``allow_errors`` the exception of a rank that
    raised (or a RankError, if it died) stands in its place; otherwise the first one fails the test, with what others
    say within a second.
    ``networks``: of each rank the network namespace that it is in, as a file; empty: they are where the tests are.
    """
    with tempfile.TemporaryDirectory(prefix="remuda-ranks-") as directory:
        store_path = str(Path(directory) / "store")
        processes, pipes = [], []
        try:
            for rank in range(num_ranks):
                receiver, sender = _context.Pipe(duplex=False)
                context = (rank, num_ranks, store_path, networks[rank] if networks else None)
                process = _context.Process(target=_rank_main, args=(sender, function, context, args), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(pipes, time.monotonic() + timeout_s, allow_errors)
        finally:
            for process in processes:
                if allow_errors or process.exitcode is None:
                    process.join(0.2)
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline: float, allow_errors: bool) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not answer in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            result, error, details = _receive(pipe)
            if error is not None and not allow_errors:
                others = {other: number for other, number in waiting.items() if other is not pipe}
                raise RankError("\n".join([f"rank {rank}: {details}", *_aftermath(others)]))
            results[rank] = result if error is None else error
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[Any, Exception | None, str]:
    try:
        result, error, details = pipe.recv()
    except EOFError:
        return None, RankError("the rank died"), "died"
    return result, error, details


def _aftermath(waiting: dict[Connection, int]) -> list[str]:
    """What other ranks say soon after the first: that one may be a victim, and the culprit slower to tell."""
    deadline, told = time.monotonic() + _AFTERMATH_S, []
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            _, error, details = _receive(pipe)
            told.append(f"rank {rank} {f'too: {details}' if error is not None else 'ended well'}")
    return told


def _rank_main(
    sender: Connection,
    function: Callable[..., Any],
    context: tuple[int, int, str, Path | None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    rank, num_ranks, store_path, network = context
    try:
        if network is not None:
            _enter(network)
        result = function(RankContext(rank, num_ranks, dist.FileStore(store_path, num_ranks)), *args)
    except Exception as error:
        sender.send((None, error, traceback.format_exc()))
    else:
        sender.send((result, None, ""))
    finally:
        sender.close()


def _enter(network: Path) -> None:
    """Before this process has a second thread: those that it starts are then in the namespace too."""
    libc = ctypes.CDLL(None, use_errno=True)
    with network.open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {network}")
