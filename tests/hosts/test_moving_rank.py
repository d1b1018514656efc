"""A host is lost under a gang, and another one has room: the rank moves there, and no stream notices but by a pause."""

from pathlib import Path

import pytest

from tests.chaos.cell import Cell, Moment, run_cell, unfaulted
from tests.chaos.hosts import RANK_1, kill_raylet, on_rank_1
from tests.chaos.several_hosts import several_hosts
from tests.chaos.site import settle

pytestmark = pytest.mark.netns


@pytest.mark.full
@pytest.mark.timeout(280)
def test_a_rank_moves_to_a_host_with_room_when_its_own_is_lost(tmp_path: Path) -> None:
    with several_hosts(tmp_path) as site:
        settle(site)
        lost = site.host_of(1)
        expected, rows = unfaulted(site, (Moment.DECODE,))
        cell = Cell("kill -9 raylet", Moment.DECODE, on_rank_1(kill_raylet), RANK_1)
        rows.append(run_cell("", site, cell, expected))
        assert [row.wrong for row in rows] == [(), ()]
        spare = site.host_of(1)
        assert spare not in (lost, site.serving)
        (rank_1,) = [rank for rank in site.status()["ranks"] if rank["rank"] == 1]
        assert rank_1["pid"] in spare.pids()
        assert f"rank 1 moves from {lost.address} to {spare.address}" in site.log
