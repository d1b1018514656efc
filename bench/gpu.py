"""``make bench-gpu``: the CUDA paths checked for correctness, then measured against what this GPU can do.

    python -m bench.gpu [--only checks,kernels,steps] [--repetitions 5] [--quick] [--out out/gpu.json]

Checks come first: the kernels' tests (tests/kernels, compiled here, where a machine without a GPU interprets them);
whole steps of remuda-tiny with and without CUDA graphs; and remuda-tiny served by the engine itself (bench.gpu_serving:
formats, adapters, grammars, embeddings, one and two plans in flight; over NCCL where there are two GPUs), all against
the CPU in float32. What this machine cannot check is named. The ceilings (a copy of memory, a bfloat16 product) are
measured again beside every figure. Each section is printed and written when it is over; one that fails is named, and
the next one goes on. Without a CUDA device it says so and exits with 2; where something failed, with 1. Where a command
may take ten minutes only, give each section a command and an --out of its own.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from bench.interrupts import run_main
from bench.measure import Row
from bench.output import machine, make_console, print_rows, write_rows

SECTIONS = ("checks", "kernels", "steps")
OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
_TEST_TIMEOUT_S = 420.0
"""Of tests/kernels: so that the other checks still have their turn in a command of ten minutes."""


@dataclass
class Report:
    """What was found, written to ``path`` as it comes: ``about`` what it was found on."""

    path: Path
    console: Console
    about: dict[str, object]
    began_s: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, what: str) -> None:
        self.console.print(f"left out: {what}", markup=False)
        self.left_out.append(what)

    def judged(self, name: str, verdict: str, text: str) -> None:
        self.console.print(f"{verdict:11} {name}: {text}", markup=False)
        if verdict == FAILED:
            self.failures.append(name)
        elif verdict == NOT_CHECKED:
            self.not_checked.append(name)
        self.write()

    def measure(self, name: str, rows: Callable[[], Iterable[Row]]) -> None:
        """A section to its end, or until it fails; what it gave until then is kept."""
        found: list[Row] = []
        try:
            for each in rows():
                found.append(each)
        except Exception as error:  # noqa: BLE001  whatever a path does, the other sections are still to be measured
            self.judged(f"section {name}", FAILED, "".join(traceback.format_exception(error)))
        self.rows += found
        print_rows(found, self.console)
        self.write()

    def write(self) -> None:
        found = {
            "failed": self.failures,
            "not_checked": self.not_checked,
            "left_out": self.left_out,
        }
        write_rows(self.path, self.rows, time.monotonic() - self.began_s, self.about | found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="which, separated by commas")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repetition on small shapes: shows that all runs")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, not {arguments.repetitions}")
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and torch finds none on this machine", file=sys.stderr)
        return 2
    report = Report(arguments.out, make_console(), machine() | gpu())
    _run(report, names, 1 if arguments.quick else arguments.repetitions, arguments.quick)
    report.console.print(
        f"{len(report.rows)} figures in {arguments.out}; {len(report.failures)} checks or sections failed, "
        f"{len(report.not_checked)} not made"
    )
    return 1 if report.failures else 0


def _run(report: Report, names: Sequence[str], num_repetitions: int, quick: bool) -> None:
    def kernels() -> Iterable[Row]:
        from bench import gpu_kernels

        return gpu_kernels.run(num_repetitions, quick)

    def steps() -> Iterable[Row]:
        from bench import gpu_steps

        return gpu_steps.run(num_repetitions, quick, report.leave_out)

    if "checks" in names:
        check(report)
    if "kernels" in names:
        report.measure("kernels", kernels)
    if "steps" in names:
        report.measure("steps", steps)


def gpu() -> dict[str, object]:
    """What the figures were measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def check(report: Report) -> None:
    from bench.gpu_checks import CHECKS

    report.judged("tests/kernels", *judge_tests([sys.executable, "-m", "pytest", "-q", "tests/kernels"]))
    for name, made in CHECKS.items():
        report.judged(name, *judge(made))


def judge_tests(command: Sequence[str], timeout_s: float = _TEST_TIMEOUT_S) -> tuple[str, str]:
    """The verdict on a command that exits with 0 where all is well, and what led to it."""
    try:
        status = subprocess.run(command, timeout=timeout_s, check=False).returncode
    except subprocess.TimeoutExpired:
        return FAILED, f"not over in {timeout_s:g} s"
    return (FAILED if status else OK), f"exit status {status}"


def judge(made: Callable[[], tuple[float, float]]) -> tuple[str, str]:
    """A check's verdict, and what led to it."""
    from bench.gpu_checks import NotChecked

    try:
        worst, bound = made()
    except NotChecked as reason:
        return NOT_CHECKED, str(reason)
    except Exception as error:  # noqa: BLE001  whatever a path does, the others are still to be checked
        return FAILED, "".join(traceback.format_exception(error))
    return OK if worst <= bound else FAILED, f"off by {worst:.3g}, at most {bound:.3g}"


if __name__ == "__main__":
    run_main(main)
