"""``make chaos``: every fault, at every moment, with every kind of request; prints and writes the table."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import balancing, control_plane, disk, front_ends, hosts, processes, starting
from tests.chaos.cell import Row

GROUPS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "ranks": processes.ranks,
    "experts": processes.experts,
    "stops": processes.stops,
    "balancing": balancing.balancing,
    "links": hosts.links,
    "hosts": hosts.hosts,
    "disk": disk.disk_full,
    "control-plane": control_plane.control_plane,
    "starting": starting.starting,
    "front-ends": front_ends.front_ends,
}
FILE = Path(__file__).parents[2] / "docs" / "chaos.md"
COLUMNS = (
    "cluster",
    "fault",
    "in the middle of",
    "requests",
    "lost",
    "duplicated",
    "differ",
    "longest pause, s",
    "new",
)
TEXT = """# What breaks, and what clients see of it

`make chaos` writes this table: commit {commit}, {seconds:.0f} s.

While requests of every kind run at once (greedy; seeded with penalties; two choices; log-probabilities; a JSON schema;
a tool call; most of them streamed, some asked for whole) something is broken in real processes of `remuda serve`. Every
answer is held against the same request's without a fault: tokens, text, tool calls, finish reasons and usage equal,
log-probabilities to 0.001. *Lost* ended with an error or without some of its tokens, *duplicated* had more than it
should, *differ* had other ones. The pause is the longest of any stream between two events after the fault, or before
its first. *New* are the processes that are others afterwards; all that are not named kept theirs.

{table}
"""


def cells_of(row: Row) -> list[str]:
    outcome = row.outcome
    return [
        row.site,
        row.fault,
        row.moment,
        str(outcome.num_requests),
        str(outcome.lost),
        str(outcome.duplicated),
        str(outcome.differing),
        f"{outcome.gap_s:.2f}",
        ", ".join(row.replaced) or "nobody",
    ]


def as_table(rows: list[Row]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells_of, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(groups: list[str]) -> Iterator[Row]:
    """Rows as they come."""
    for name in groups:
        with tempfile.TemporaryDirectory(prefix="remuda-chaos-") as directory:
            yield from GROUPS[name](Path(directory))


def main() -> int:
    """Exit status 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.chaos ranks --no-write", prog="python -m tests.chaos"
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--no-write", action="store_true", help="leave docs/chaos.md as it is")
    arguments = parser.parse_args()
    groups = arguments.groups or list(GROUPS)
    began_s = time.monotonic()
    rows = []
    for row in run(groups):
        rows.append(row)
        print("  ".join(cells_of(row)), *(f"\n    {line}" for line in row.wrong), flush=True)
    table = as_table(rows)
    print(f"\n{table}")
    if not arguments.no_write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        seconds = time.monotonic() - began_s
        FILE.write_text(TEXT.format(commit=commit.stdout.strip(), seconds=seconds, table=table))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
