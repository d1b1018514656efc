"""Faults of processes on one host: ranks, leaders and front ends are killed or stopped."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.cell import Cell, Choice, Moment, Row, moments_of, run_cell, unfaulted
from tests.chaos.site import Site, one_host

SHORT_STOP_S = 0.5
OPTIONS = ("--tp", "2", "--spare-ranks", "1", "--max-num-batched-tokens", "64", "--deterministic")


def kill(name: str) -> Callable[[Site], None]:
    """``kill -9`` of a rank or of the leader of a cluster that was whole when its requests began."""
    return lambda site: os.kill(site.whole[name], signal.SIGKILL)


def stop(name: str) -> Callable[[Site], None]:
    return lambda site: os.kill(site.whole[name], signal.SIGSTOP)


def stop_shortly(name: str) -> Callable[[Site], None]:
    def strike(site: Site) -> None:
        pid = site.whole[name]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(SHORT_STOP_S)  # the fault itself
        os.kill(pid, signal.SIGCONT)

    return strike


def kill_program(words: str) -> Callable[[Site], None]:
    """``kill -9`` of the one process whose program has these words in its name."""

    def strike(site: Site) -> None:
        (victim,) = [each for each in site.processes() if words in " ".join(each.cmdline()[:1])]
        victim.kill()

    return strike


def only(*names: str) -> frozenset[str]:
    return frozenset(names)


KILLS = [
    Cell("kill -9 rank 1", Moment.DECODE, kill("rank 1"), only("rank 1")),
    Cell("kill -9 rank 0", Moment.PREFILL, kill("rank 0"), only("rank 0")),
    Cell("kill -9 leader", Moment.DECODE, kill("leader"), only("leader")),
    Cell("kill -9 leader", Moment.PREFILL, kill("leader"), only("leader")),
]
STOPS = [
    Cell(f"SIGSTOP rank 1 for {SHORT_STOP_S:g} s", Moment.DECODE, stop_shortly("rank 1")),
    Cell("SIGSTOP rank 1", Moment.DECODE, stop("rank 1"), only("rank 1")),
    Cell("SIGSTOP rank 0", Moment.PREFILL, stop("rank 0"), only("rank 0")),
    Cell("SIGSTOP leader", Moment.DECODE, stop("leader"), only("leader")),
    Cell("SIGSTOP leader", Moment.PREFILL, stop("leader"), only("leader")),
]


def ranks(directory: Path, choice: Choice) -> Iterator[Row]:
    with one_host(directory, *OPTIONS) as site:
        yield from struck("tp2", site, choice.of(KILLS))


def experts(directory: Path, choice: Choice) -> Iterator[Row]:
    with one_host(directory, *OPTIONS, "--ep", "2") as site:
        yield from struck("tp2 ep2", site, choice.of(KILLS))


def stops(directory: Path, choice: Choice) -> Iterator[Row]:
    with one_host(directory, *OPTIONS, "--ep", "2") as site:
        yield from struck("tp2 ep2", site, choice.of(STOPS))


def grpc_streams(directory: Path, choice: Choice) -> Iterator[Row]:
    """The same requests over remuda.v1, all of them streams."""
    with one_host(directory, *OPTIONS, speaks_grpc=True) as site:
        yield from struck("tp2, gRPC", site, choice.of([cell for cell in KILLS if cell.moment == Moment.DECODE]))


def struck(name: str, site: Site, cells: list[Cell]) -> Iterator[Row]:
    """First without a fault."""
    expected, rows = unfaulted(site, moments_of(cells))
    yield from (dataclasses.replace(row, site=name) for row in rows)
    for cell in cells:
        yield run_cell(name, site, cell, expected)
