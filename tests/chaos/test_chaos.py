"""A part of ``make chaos``: one cluster, and one fault of each kind."""

from pathlib import Path

import pytest

from tests.chaos.cell import Cell, Moment, run_cell, unfaulted
from tests.chaos.processes import OPTIONS, SHORT_STOP_S, kill, only, stop, stop_shortly
from tests.chaos.site import one_host
from tests.chaos.table import GROUPS

CELLS = [
    Cell("kill -9 rank 1", Moment.DECODE, kill("rank 1"), only("rank 1")),
    Cell("kill -9 leader", Moment.DECODE, kill("leader"), only("leader")),
    Cell("SIGSTOP rank 0", Moment.DECODE, stop("rank 0"), only("rank 0")),
    Cell(f"SIGSTOP rank 1 for {SHORT_STOP_S:g} s", Moment.DECODE, stop_shortly("rank 1")),
]


@pytest.mark.full
@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    with one_host(tmp_path, *OPTIONS, "--ep", "2") as site:
        expected, rows = unfaulted(site, (Moment.DECODE,))
        rows += [run_cell("tp2 ep2", site, cell, expected) for cell in CELLS]
        assert [(row.fault, row.moment, row.wrong) for row in rows if row.wrong] == []
    assert site.served.left_processes() == []


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", GROUPS)
def test_every_cell_holds(group: str, tmp_path: Path) -> None:
    rows = list(GROUPS[group](tmp_path))
    assert [(row.fault, row.moment, row.wrong) for row in rows if row.wrong] == []
