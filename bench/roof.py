"""``make bench-roof``: native kernels and whole steps as fractions of what this machine can do at best.

    python -m bench.roof [--only kernels,attention,encoded,elementwise,routing,experts,collectives,step]
        [--model dense-1b] [--tp 2] [--quantization int8] [--repetitions 5] [--quick] [--out out/roof.json]

The ceilings (memory reads in huge pages, a bfloat16 product) are measured again beside every figure, in the same run.
Run it on a machine that does nothing else.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import (
    roof_attention,
    roof_collectives,
    roof_elementwise,
    roof_encoded,
    roof_experts,
    roof_kernels,
    roof_routing,
    roof_step,
)
from bench.bench_cache import model_dir
from bench.measure import Row
from bench.output import machine, make_console, print_rows, write_rows

KERNELS: dict[str, Callable[[int, bool, int], list[Row]]] = {
    "kernels": roof_kernels.run,
    "attention": roof_attention.run,
    "encoded": roof_encoded.run,
    "elementwise": roof_elementwise.run,
    "routing": roof_routing.run,
    "experts": roof_experts.run,
}
SECTIONS = (*KERNELS, "collectives", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="which, separated by commas")
    parser.add_argument("--model", default="dense-1b", help="a directory, or a name of make bench-models")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the step, and threads of the kernels")
    parser.add_argument("--quantization", choices=["int8"], help="of the step's weights")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="one repetition on little data: shows that everything runs"
    )
    parser.add_argument("--out", type=Path, default=Path("out/roof.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    for option in ("repetitions", "tp"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} must be at least 1, not {getattr(arguments, option)}")
    model = Path(arguments.model) if Path(arguments.model).is_dir() else model_dir(arguments.model)
    if "step" in names and not (model / "config.json").exists():
        parser.error(f"--model {arguments.model}: {model} is not there; make bench-models builds it")
    console = make_console()
    began_s, about, rows = time.monotonic(), machine(), []
    for name in names:
        with Console(stderr=True).status(f"{name} …"):
            found = _section(name, arguments, model)
        print_rows(found, console)
        rows += found
    about |= {"tp": arguments.tp, "model": model.name, "quantization": arguments.quantization}
    write_rows(arguments.out, rows, time.monotonic() - began_s, about)
    console.print(f"{len(rows)} figures in {arguments.out}")
    return 0


def _section(name: str, arguments: argparse.Namespace, model: Path) -> list[Row]:
    repetitions, quick = 1 if arguments.quick else arguments.repetitions, arguments.quick
    if name in KERNELS:
        return KERNELS[name](repetitions, quick, arguments.tp)
    if name == "collectives":
        return roof_collectives.run(repetitions, quick)
    return roof_step.run(repetitions, quick, model, arguments.tp, arguments.quantization)


if __name__ == "__main__":
    sys.exit(main())
