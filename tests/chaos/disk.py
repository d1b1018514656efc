"""A full disk: what the cluster writes (flight records, temporary files) has no room left while requests run."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Cell, Choice, Moment, Row
from tests.chaos.processes import OPTIONS, kill, only, struck
from tests.chaos.site import Site, one_host
from tests.chaos.starting import StartFault, struck_at_start
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


def disk_full(directory: Path, choice: Choice) -> Iterator[Row]:
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
        yield from struck("tp2", site, choice.of(cells))


def disk_full_at_start(directory: Path, choice: Choice) -> Iterator[Row]:
    """While the model loads, and from the beginning."""
    copy_model(directory / "model")
    small = directory / "d"
    faults = {
        False: StartFault("disk full", lambda served: fill(small), survives=True),
        True: StartFault("disk full from the beginning", lambda served: None),
    }
    with small_disk(small):
        for from_the_beginning, fault in choice.of(list(faults.items())):
            if from_the_beginning:
                fill(small)
            yield struck_at_start(directory, fault, small)
