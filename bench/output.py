"""What all benchmarks print and write: tables on the terminal, the same as JSON."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import Row, Spread


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """A table for each benchmark and note."""
    for (benchmark, _, _), group in groupby(rows, key=lambda each: (each.benchmark, each.notes, each.unit)):
        console.print(table(benchmark, list(group)))


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def write_rows(path: Path, rows: Sequence[Row], seconds: float, about: dict[str, object]) -> None:
    """``about``: ``machine()`` before the run, and what else is to be known."""
    result = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": about,
        "rows": [asdict(each) for each in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


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
    tells_clean = any(each.clean_of_all for each in rows)
    if tells_clean:
        found.add_column("clean/all", justify="right")
    for each in rows:
        spread = f"{_number(each.ratio.low)} to {_number(each.ratio.high)}"
        cells = [each.case, _median(each.ours), _median(each.reference), _number(each.ratio.median), spread]
        found.add_row(*cells, *([_clean(each)] if tells_clean else []))
    return found


def _clean(shown: Row) -> str:
    if shown.clean_of_all is None:
        return ""
    num_clean, num_pairs = shown.clean_of_all
    return f"{num_clean}/{num_pairs}" if num_clean else f"0/{num_pairs}, DISTURBED"


def _median(spread: Spread) -> str:
    return _number(spread.median)


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
