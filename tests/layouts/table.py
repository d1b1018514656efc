"""Every legal layout of powers of two with at most eight ranks, on one host and over three, against transformers:
``python -m tests.layouts`` (``make layouts``) prints the table and writes docs/layouts.md.

What is done is kept in out/ by the state of the code that a case runs, so that a run that was interrupted goes on where
it was, also under a later commit that changed only documents, commands or other tests. Hosts are network
namespaces; needs root, iproute2 and nftables.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.config import ParallelConfig
from tests.layouts.models import LAYOUT_MODELS, MANY_HOSTS, Case, all_cases, layout_name, make_layout_reference
from tests.layouts.run import TOLERANCE, Hosts, largest_difference, run_layout
from tests.support.hosts.bed import Bed
from tests.support.hosts.namespaces import why_not

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs/layouts.md"
_RUN = ("engine", "cluster/replica", "tests/layouts", "tests/parity", "tests/support")
"""What a case's processes are made of. New files that git does not know yet are not seen."""
Results = dict[str, float | str]
"""By case: the largest difference, or why there is none."""


@contextmanager
def all_hosts() -> Iterator[Mapping[int, Hosts]]:
    """By their number: this host, and several. Raises RuntimeError where no hosts can be made."""
    if (reason := why_not()) is not None:
        raise RuntimeError(f"no hosts can be made: {reason}")
    with Bed(MANY_HOSTS) as bed:
        yield {1: Hosts(), MANY_HOSTS: Hosts.of(bed)}


def run_all(cases: Iterable[Case], results: Results, kept: Path) -> None:
    """Fills ``results``; each is also appended to ``kept`` at once."""
    with tempfile.TemporaryDirectory(prefix="remuda-layouts-") as directory, all_hosts() as hosts:
        references = {name: make_layout_reference(name, Path(directory) / name) for name in LAYOUT_MODELS}
        for case in left(cases, results):
            began_s = time.monotonic()
            try:
                answer = run_layout(references[case.model], case.parallel, hosts[case.num_hosts])
                found: float | str = largest_difference(references[case.model], case.parallel, answer)
            except AssertionError as error:  # a rank that failed is one too
                found = str(error)
            results[str(case)] = found
            with kept.open("a") as file:
                file.write(json.dumps([str(case), found]) + "\n")
            print(f"{case}: {found} ({time.monotonic() - began_s:.1f} s)", flush=True)


def left(cases: Iterable[Case], results: Results) -> list[Case]:
    """Those that have no number. A failure may have been a disturbed run's, so it is tried again."""
    return [case for case in cases if not isinstance(results.get(str(case)), float)]


def table(cases: Iterable[Case], results: Results) -> list[str]:
    """Markdown: a row for each layout; models and numbers of hosts as columns."""
    columns = [(name, num_hosts) for name in LAYOUT_MODELS for num_hosts in (1, MANY_HOSTS)]
    titles = [f"{LAYOUT_MODELS[name].title}, {num_hosts} host{'s' * (num_hosts > 1)}" for name, num_hosts in columns]
    rows: dict[ParallelConfig, dict[tuple[str, int], str]] = {}
    for case in cases:
        rows.setdefault(case.parallel, {})[case.model, case.num_hosts] = _cell(results.get(str(case)))
    lines = ["| layout | ranks | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(columns)]
    for layout, row in sorted(rows.items(), key=lambda item: (item[0].num_ranks, layout_name(item[0]))):
        cells = " | ".join(row.get(column, "") for column in columns)
        lines.append(f"| {layout_name(layout)} | {layout.num_ranks} | {cells} |")
    return lines


def _cell(found: float | str | None) -> str:
    if found is None:
        return "not run"
    return f"{found:.1e}" if isinstance(found, float) and found <= TOLERANCE else "FAILED"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _state() -> str:
    """Of everything that decides a case's result, uncommitted changes included."""
    parts = [_git("rev-parse", f"HEAD:{path}") for path in _RUN] + [_git("diff", "HEAD", "--", *_RUN)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _commit() -> str:
    return _git("rev-parse", "--short", "HEAD") + "-changed" * bool(_git("diff", "HEAD", "--", *_RUN))


def _heading(commit: str, num_done: int, num_cases: int) -> str:
    return f"""# Every layout against transformers

`make layouts` writes this table: commit {commit}, {num_done} of {num_cases} cases, float32.

A cell is the largest difference of any logit of the model, at every position of three texts in every dp group, and of
any log-probability that the engine gave, from transformers' eager float32 on the same checkpoint; a cell is given only
where that is at most {TOLERANCE:g} and every greedy token was equal, else it says FAILED. An empty cell: one rank has
one host, or a dense model has no experts to spread. Each case is served: a leader, its step channel, several
plans in flight, prompts in chunks while others decode, fewer slots than requests, and cached beginnings. Three
hosts are network namespaces with addresses of their own: what crosses them goes over TCP. The checkpoints are random
and tiny (8 layers, 8 heads, 2 key-value heads, 8 experts), their chunks and rotary contexts so short that texts cross
their borders.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Example: make layouts"
    )
    parser.parse_args()
    commit = _commit()
    kept = ROOT / "out" / f"layouts-{_state()}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    results: Results = dict(map(json.loads, kept.read_text().splitlines())) if kept.exists() else {}
    cases = all_cases()
    try:
        run_all(cases, results, kept)
    finally:  # also of a run that was interrupted: what is left says so
        text = "\n".join([_heading(commit, len(results), len(cases)), *table(cases, results), ""])
        TABLE.write_text(text, encoding="utf-8")
    print(text)
    failed = [case for case in cases if _cell(results[str(case)]) == "FAILED"]
    for case in failed:
        print(f"FAILED {case}: {results[str(case)]}", file=sys.stderr)
    return bool(failed)
