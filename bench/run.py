"""``make bench``: our own path's cost as ratios to references measured in the same run.

    python -m bench.run [--only host-step,streaming,idle,end-to-end] [--repetitions 5] [--quick] [--out out/bench.json]

Prints a table and writes the same as JSON. Absolute figures depend on the machine and on what else runs there; only
the ratios are meant to be compared between runs, and their spread says how far.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import end_to_end, host_step, idle, streaming
from bench.interrupts import run_main
from bench.measure import Row
from bench.output import machine, make_console, print_rows, write_rows

BENCHMARKS: dict[str, Callable[[int, bool], list[Row]]] = {
    "host-step": host_step.run,
    "streaming": streaming.run,
    "idle": idle.run,
    "end-to-end": end_to_end.run,
}


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
    console = make_console()
    began_s = time.monotonic()
    rows: list[Row] = []
    about = machine()
    for name in names:
        with Console(stderr=True).status(f"{name} …"):
            found = BENCHMARKS[name](1 if arguments.quick else arguments.repetitions, arguments.quick)
        rows += found
        print_rows(found, console)
    write_rows(arguments.out, rows, time.monotonic() - began_s, about)
    console.print(f"{len(rows)} figures in {arguments.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
