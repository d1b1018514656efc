"""``make bench-gpu``: the CUDA paths checked for correctness, then measured against what this GPU can do.

    python -m bench.gpu [--only checks,kernels,steps] [--repetitions 5] [--quick] [--out out/gpu.json]

Checks come first: the kernels' tests (tests/kernels, compiled here, where a machine without a GPU interprets them);
whole steps of remuda-tiny with and without CUDA graphs; and remuda-tiny served by the engine itself (bench.gpu_serving:
formats, adapters, grammars, embeddings, one and two plans in flight; over NCCL where there are two GPUs), all against
the CPU in float32. What this machine cannot check is named. The ceilings (a copy of memory, a bfloat16 product) are
measured again beside every figure. Without a CUDA device it says so and exits with 2; where a check failed, with 1.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from bench.measure import Row
from bench.output import machine, make_console, print_rows, write_rows

SECTIONS = ("checks", "kernels", "steps")
OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
_TEST_TIMEOUT_S = 1200


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
    console, began_s, about = make_console(), time.monotonic(), machine() | gpu()
    failures, missing = check(console) if "checks" in names else ([], [])
    rows = _measure(names, 1 if arguments.quick else arguments.repetitions, arguments.quick)
    print_rows(rows, console)
    about["failed_checks"], about["not_checked"] = failures, missing
    write_rows(arguments.out, rows, time.monotonic() - began_s, about)
    console.print(f"{len(rows)} figures in {arguments.out}; {len(failures)} checks failed, {len(missing)} not made")
    return 1 if failures else 0


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


def check(console: Console) -> tuple[list[str], list[str]]:
    """Names of the checks that failed, and of those that this machine cannot make; all are printed as they come."""
    from bench.gpu_checks import CHECKS

    failures, missing = [], []
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels"]
    if subprocess.run(command, timeout=_TEST_TIMEOUT_S, check=False).returncode:
        failures.append("tests/kernels")
    for name, made in CHECKS.items():
        verdict, text = judge(made)
        console.print(f"{verdict:11} {name}: {text}", markup=False)
        if verdict == FAILED:
            failures.append(name)
        elif verdict == NOT_CHECKED:
            missing.append(name)
    return failures, missing


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


def _measure(names: list[str], num_repetitions: int, quick: bool) -> list[Row]:
    from bench import gpu_kernels, gpu_steps

    rows: list[Row] = []
    if "kernels" in names:
        rows += gpu_kernels.run(num_repetitions, quick)
    if "steps" in names:
        rows += gpu_steps.run(num_repetitions, quick)
    return rows


if __name__ == "__main__":
    sys.exit(main())
