"""``make chaos``: every fault, at every moment, with every kind of request; prints the rows and writes them down."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.chaos import balancing, control_plane, disk, front_ends, hosts, processes, starting
from tests.chaos.cell import Choice, Row
from tests.chaos.comparison import Outcome

GROUPS: dict[str, Callable[[Path, Choice], Iterator[Row]]] = {
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
    "control-process": control_plane.control_process,
    "starting": starting.starting,
    "starting-hosts": hosts.starting_hosts,
    "front-ends": front_ends.front_ends,
    "grpc": processes.grpc_streams,
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
    "held",
    "commit",
)
NUM_KEY_COLUMNS = 3
CUT_SHORT = "the cells behind were not run"


def line_of(row: Row, commit: str) -> str:
    """Of the table."""
    outcome = row.outcome
    cells = [
        row.site,
        row.fault,
        row.moment,
        str(outcome.num_requests),
        str(outcome.lost),
        str(outcome.duplicated),
        str(outcome.differing),
        f"{outcome.gap_s:.2f}",
        ", ".join(row.replaced) or "nobody",
        "no" if row.wrong else "yes",
        commit,
    ]
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


COLUMN_NAMES, RULE = _line(COLUMNS), _line(["---"] * len(COLUMNS))


def _key(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split("|")[1 : 1 + NUM_KEY_COLUMNS])


def with_row(text: str, group: str, line: str) -> str:
    """The document with this row in the section ``## `GROUP` …``, in the place of the one of the same cluster, fault
    and moment, or as the last of its table. Raises ValueError where it has no such section."""
    head, heading, rest = text.partition(f"\n## `{group}`")
    if not heading:
        raise ValueError(f"no section `{group}`")
    section, next_heading, tail = rest.partition("\n## ")
    lines = section.rstrip().split("\n")
    words = [each for each in lines if not each.startswith("|")]
    rows = {_key(each): each for each in [*[each for each in lines if each.startswith("|")][2:], line]}
    table = [COLUMN_NAMES, RULE, *rows.values()]
    section = "\n".join(["\n".join(words).rstrip(), "", *table, ""])
    return head + heading + section + next_heading + tail


def with_only(text: str, group: str, lines: Iterable[str]) -> str:
    """The document without the rows of that section whose cluster, fault and moment are those of none of ``lines``."""
    head, heading, rest = text.partition(f"\n## `{group}`")
    section, next_heading, tail = rest.partition("\n## ")
    keys = {_key(COLUMN_NAMES), _key(RULE), *map(_key, lines)}
    kept = [each for each in section.split("\n") if not each.startswith("|") or _key(each) in keys]
    return head + heading + "\n".join(kept) + next_heading + tail


def run(group: str, choice: Choice, commit: str) -> Iterator[tuple[Row, str]]:
    """Each row with its line of the table, which is printed as it comes. A group whose cluster does not come to rest
    ends with a row that says so."""
    with tempfile.TemporaryDirectory(prefix="remuda-chaos-") as directory:
        for row in _rows(group, Path(directory), choice):
            line = line_of(row, commit)
            print(line, *(f"\n    {wrong}" for wrong in row.wrong), flush=True)
            yield row, line


def _rows(group: str, directory: Path, choice: Choice) -> Iterator[Row]:
    try:
        yield from GROUPS[group](directory, choice)
    except AssertionError as error:  # NotSettled and its like
        nothing = Outcome(0, 0, 0, 0, 0.0, ())
        yield Row(f"group {group}", CUT_SHORT, "-", nothing, (), (f"{type(error).__name__}: {error}",))


def present_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Exit status 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples: python -m tests.chaos ranks stops; python -m tests.chaos lost-raylet --cell 2 --no-write",
        prog="python -m tests.chaos",
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument(
        "--cell", type=int, action="append", default=[], metavar="N", help="of each group these; default: all"
    )
    parser.add_argument("--no-write", action="store_true", help="leave docs/chaos.md as it is")
    arguments = parser.parse_args()
    commit = present_commit()
    is_wrong = False
    for group in arguments.groups or GROUPS:
        lines, is_whole = [], not arguments.cell
        for row, line in run(group, Choice(*arguments.cell), commit):
            is_wrong |= bool(row.wrong)
            is_whole &= row.fault != CUT_SHORT
            lines.append(line)
            if not arguments.no_write:
                FILE.write_text(with_row(FILE.read_text(), group, line))
        if is_whole and not arguments.no_write:
            # What the whole group no longer gives is of cells that are no more.
            FILE.write_text(with_only(FILE.read_text(), group, lines))
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
