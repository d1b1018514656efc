"""Ray's control service dies under a gang on one host: requests run on; once Ray's patience is over, all of it ends."""

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Moment, Row, Strike, unfaulted
from tests.chaos.clients import run_all
from tests.chaos.comparison import judge
from tests.chaos.processes import OPTIONS
from tests.chaos.site import Site, one_host, settle

END_TIMEOUT_S = 100.0
"""Of which Ray takes 60."""


def kill_gcs(site: Site) -> None:
    (victim,) = [each for each in site.processes() if "gcs_server" in " ".join(each.cmdline()[:1])]
    victim.kill()


def control_plane(directory: Path) -> Iterator[Row]:
    with one_host(directory, *OPTIONS) as site:
        expected, rows = unfaulted(site, (Moment.DECODE,))
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        settle(site)
        strike = Strike(Moment.DECODE, site.num_live, lambda: kill_gcs(site))
        clients = run_all(Moment.bodies(Moment.DECODE), site.urls, None, strike)
        outcome = judge(clients, expected[Moment.DECODE], strike.struck_s)
        wrong = [*strike.wrong, *outcome.notes]
        assert site.served.process is not None
        try:
            status = site.served.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            wrong.append("the server did not end")
        else:
            wrong += [] if status == 1 else [f"status {status}"]
        wrong += site.served.left_processes(30.0)
        yield Row("tp2", "kill -9 GCS", Moment.DECODE, outcome, (), tuple(wrong))
