"""``make chaos``: every fault, at every moment, with every kind of request; prints the rows and writes them down."""

import argparse
import re
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
    "links-prefill": hosts.links_in_prefill,
    "head": hosts.head,
    "lost-raylet": hosts.lost_raylet,
    "lost-link": hosts.lost_link,
    "lost-packets": hosts.lost_packets,
    "disk": disk.disk_full,
    "disk-at-start": disk.disk_full_at_start,
    "control-plane": control_plane.control_plane,
    "raylet": control_plane.raylet,
    "starting": starting.starting,
    "starting-hosts": hosts.starting_hosts,
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


def with_section(text: str, group: str, found: str) -> str:
    """The document with what was found in place of what was found before: in the section ``## `GROUP` …``, from the
    line that begins with "Commit" to the next heading. Raises ValueError where it has no such section."""
    section = re.compile(rf"(^## `{group}`.*?\n)(Commit .*?)?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if len(section.findall(text)) != 1:
        raise ValueError(f"no section `{group}`")
    return section.sub(lambda match: f"{match[1].rstrip()}\n\n{found}\n\n", text).rstrip() + "\n"


def run(group: str) -> list[Row]:
    """Prints each row as it comes."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="remuda-chaos-") as directory:
        for row in GROUPS[group](Path(directory)):
            rows.append(row)
            print("  ".join(cells_of(row)), *(f"\n    {line}" for line in row.wrong), flush=True)
    return rows


def main() -> int:
    """Exit status 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.chaos ranks --no-write", prog="python -m tests.chaos"
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--no-write", action="store_true", help="leave docs/chaos.md as it is")
    arguments = parser.parse_args()
    is_wrong = False
    for group in arguments.groups or GROUPS:
        began_s = time.monotonic()
        rows = run(group)
        is_wrong |= any(row.wrong for row in rows)
        if not arguments.no_write:
            git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
            found = f"Commit {git.stdout.strip()}, {time.monotonic() - began_s:.0f} s.\n\n{as_table(rows)}"
            FILE.write_text(with_section(FILE.read_text(), group, found))
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
