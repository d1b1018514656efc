"""A part of ``make chaos``: one cluster, and faults of each kind."""

from pathlib import Path

import pytest

from tests.chaos.cell import Cell, Moment, run_cell, unfaulted
from tests.chaos.processes import OPTIONS, SHORT_STOP_S, kill, only, stop, stop_shortly
from tests.chaos.site import one_host

KILL = Cell("kill -9 rank 1", Moment.DECODE, kill("rank 1"), only("rank 1"))
OTHERS = [
    Cell("kill -9 leader", Moment.DECODE, kill("leader"), only("leader")),
    Cell("SIGSTOP rank 0", Moment.DECODE, stop("rank 0"), only("rank 0")),
    Cell(f"SIGSTOP rank 1 for {SHORT_STOP_S:g} s", Moment.DECODE, stop_shortly("rank 1")),
]


@pytest.mark.parametrize(
    "cells", [pytest.param([KILL], id="kill"), pytest.param(OTHERS, id="others", marks=pytest.mark.full)]
)
@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_comes_twice(cells: list[Cell], tmp_path: Path) -> None:
    """The rest is in ``make chaos``."""
    with one_host(tmp_path, *OPTIONS) as site:
        expected, rows = unfaulted(site, (Moment.DECODE,))
        rows += [run_cell("tp2", site, cell, expected) for cell in cells]
        assert [(row.fault, row.moment, row.wrong) for row in rows if row.wrong] == []
    assert site.served.left_processes() == []
