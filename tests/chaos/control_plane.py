"""Ray's control service dies under a gang on one host, and so does everything when the only host's raylet does."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Cell, Moment, Row, run_cell, unfaulted
from tests.chaos.processes import OPTIONS
from tests.chaos.site import Site, one_host

ONCE_PATIENT_S = 65.0
"""Ray's own patience was 60 s."""


def kill_gcs(site: Site) -> None:
    (victim,) = [each for each in site.processes() if "gcs_server" in " ".join(each.cmdline()[:1])]
    victim.kill()


def control_plane(directory: Path) -> Iterator[Row]:
    """Requests run on, and new ones are taken long after. The end is orderly all the same."""
    with one_host(directory, *OPTIONS) as site:
        expected, rows = unfaulted(site, (Moment.DECODE,))
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        yield run_cell("tp2", site, Cell("kill -9 GCS", Moment.DECODE, kill_gcs), expected)
        time.sleep(ONCE_PATIENT_S)  # the time that matters
        after = Cell(f"GCS gone for {ONCE_PATIENT_S:g} s", Moment.DECODE, lambda site: None)
        yield run_cell("tp2", site, after, expected)
    left = site.served.left_processes(30.0)
    assert not left, left
