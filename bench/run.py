"""``make bench``: our own path's cost as ratios to references measured in the same run.

    python -m bench.run [--only host-step,streaming,end-to-end] [--repetitions 5] [--quick] [--out out/bench.json]

Prints a table and writes the same as JSON. Absolute figures depend on the machine and on what else runs there; only
the ratios are meant to be compared between runs, and their spread says how far.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import end_to_end, host_step, streaming
from bench.measure import Row, Spread

BENCHMARKS: dict[str, Callable[[int, bool], list[Row]]] = {
    "host-step": host_step.run,
    "streaming": streaming.run,
    "end-to-end": end_to_end.run,
}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average_1_min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "grpcio", "protobuf", "msgspec")},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(benchmark: str, rows: list[Row]) -> Table:
    found = Table(title=benchmark, title_justify="left", caption=rows[0].notes, caption_justify="left")
    found.add_column("case")
    found.add_column(f"ours, {rows[0].unit}", justify="right")
    found.add_column("reference", justify="right")
    found.add_column(f"ratio ({rows[0].better} is better)", justify="right")
    found.add_column("ratio's spread", justify="right")
    for each in rows:
        spread = f"{_number(each.ratio.low)} to {_number(each.ratio.high)}"
        found.add_row(each.case, _median(each.ours), _median(each.reference), _number(each.ratio.median), spread)
    return found


def _median(spread: Spread) -> str:
    return _number(spread.median)


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="which, separated by commas")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short repetition: shows that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - BENCHMARKS.keys()):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, not {arguments.repetitions}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    began_s = time.monotonic()
    rows: list[Row] = []
    about = machine()
    for name in names:
        with Console(stderr=True).status(f"{name} …"):
            found = BENCHMARKS[name](1 if arguments.quick else arguments.repetitions, arguments.quick)
        rows += found
        for benchmark, group in groupby(found, key=lambda each: (each.benchmark, each.notes)):
            console.print(table(benchmark[0], list(group)))
    result = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began_s, 1),
        "machine": about,
        "rows": [asdict(each) for each in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"{len(rows)} figures in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
