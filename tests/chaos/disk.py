"""A full disk: what the cluster writes (flight records, temporary files) has no room left while requests run."""

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Cell, Moment, Row, run_cell, unfaulted
from tests.chaos.processes import OPTIONS, kill, only
from tests.chaos.site import Site, one_host
from tests.chaos.starting import StartFault, struck
from tests.failover.processes import copy_model

SIZE = "64m"
_BLOCK = b"\0" * 2**20


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Also for flight records."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "remuda-chaos", directory], check=True)
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(directory / "state")
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill(directory: Path) -> None:
    """Until nothing more can be written."""
    with (directory / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(_BLOCK):
            pass


def disk_full(directory: Path) -> Iterator[Row]:
    """One disk for Ray's session with its logs, all temporary files and the flight records."""
    small = directory / "d"

    def fill_and_kill(site: Site) -> None:
        fill(small)
        kill("rank 1")(site)

    cells = [
        Cell("disk full", Moment.DECODE, lambda site: fill(small)),
        Cell("disk full", Moment.PREFILL, lambda site: fill(small)),
        Cell("disk full, kill -9 rank 1", Moment.DECODE, fill_and_kill, only("rank 1")),
    ]
    with small_disk(small), one_host(directory / "server", *OPTIONS, temporary=small) as site:
        expected, rows = unfaulted(site)
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        for cell in cells:
            yield run_cell("tp2", site, cell, expected)


def disk_full_at_start(directory: Path) -> Iterator[Row]:
    """While the model loads, and from the beginning."""
    copy_model(directory / "model")
    small = directory / "d"
    with small_disk(small):
        yield struck(directory, StartFault("disk full", lambda served: fill(small), survives=True), small)
        fill(small)
        yield struck(directory, StartFault("disk full from the beginning", lambda served: None), small)
