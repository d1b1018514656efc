"""``make determinism``: one request's tokens and logits, bit for bit, in all ways to compute it, and what that costs.

Prints a table for d1 (batches, chunks, restarts), one for d2 (layouts), and the speed of each mode as a ratio to the
same steps without it. Ends with 1 where anything differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.bench_cache import model_dir
from bench.roof_step import GangSteps
from engine.config import Determinism
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from tests.determinism.models import MODELS, save_model
from tests.determinism.test_determinism import FORMATS, LAYOUTS
from tests.determinism.ways import ALONE, PAIR, WAYS, Observed, Setting, Way, first_difference, observe_gang

_DECODES = ((8, 128), (4, 1000))
"""Requests, and positions of each."""
_PREFILL = 512
_NUM_STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=model_dir("dense-0.5b"), help="whose steps are timed")
    parser.add_argument("--tp", type=int, default=1, help="ranks of the timed steps")
    parser.add_argument("--only", choices=["table", "cost"], help="one of the two parts")
    arguments = parser.parse_args()
    console, num_different = Console(width=120), 0
    if arguments.only != "cost":
        with tempfile.TemporaryDirectory(prefix="remuda-determinism-") as directory:
            num_different = _d1(console, Path(directory)) + _d2(console, Path(directory))
    if arguments.only != "table":
        if (arguments.model / "config.json").exists():
            _cost(console, arguments.model, arguments.tp)
        else:
            console.print(f"{arguments.model} is not there: no cost measured; make bench-models builds it")
    return 1 if num_different else 0


def _d1(console: Console, directory: Path) -> int:
    table, num_different = _table("d1: one request beside others, in chunks, restarted", "tp", *map(str, WAYS)), 0
    for name, dtype, native in track(_models(), "d1", console=Console(stderr=True)):
        for tp in (1, 2):
            setting = Setting(str(save_model(name, directory, dtype)), Determinism.D1, native=native, tp=tp)
            found = observe_gang(setting, WAYS)
            verdicts = [_verdict({way: found[way]}, found[ALONE][-1]) for way in WAYS]
            num_different += sum(verdict != "same" for verdict in verdicts)
            table.add_row(*_labels(name, dtype, native), str(tp), *verdicts)
    console.print(table)
    return num_different


def _d2(console: Console, directory: Path) -> int:
    table, num_different = _table("d2: one request in several layouts (tp, ep, pp)", "layout", "bits"), 0
    for name, dtype, native in track(_models(), "d2", console=Console(stderr=True)):
        model = str(save_model(name, directory, dtype))
        expected: Observed | None = None
        for tp, ep, pp in [(1, 1, 1), *LAYOUTS[name]]:
            found = observe_gang(Setting(model, Determinism.D2, native=native, tp=tp, ep=ep, pp=pp), PAIR)
            expected = expected or found[ALONE][-1]
            verdict = _verdict(found, expected)
            num_different += verdict != "same"
            table.add_row(*_labels(name, dtype, native), f"tp={tp} ep={ep} pp={pp}", verdict)
    console.print(table)
    return num_different


def _models() -> list[tuple[str, torch.dtype, bool]]:
    return [(name, dtype, native) for name in MODELS for dtype in FORMATS for native in (True, False)]


def _labels(name: str, dtype: torch.dtype, native: bool) -> tuple[str, str, str]:
    return name, str(dtype).removeprefix("torch."), "native" if native else "torch"


def _verdict(found: dict[Way, list[Observed]], expected: Observed) -> str:
    return first_difference(found, expected) or "same"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in ("model", "format", "kernels", *columns):
        table.add_column(column)
    return table


def _cost(console: Console, model: Path, tp: int) -> None:
    """In bfloat16. The modes take turns, step by step: minutes of one machine differ by more than they do."""
    gangs: dict[Determinism, GangSteps] = {}
    try:
        for mode in Determinism:
            gangs[mode] = GangSteps(model, tp, None, InProcessExecutor if tp == 1 else ProcessGang, mode)
        found = [_decode_seconds(gangs, batch, context) for batch, context in _DECODES]
        found.append(_in_turns(gangs, lambda steps: steps.admit(range(1), _PREFILL)))
    finally:
        for steps in gangs.values():
            steps.gang.close()
    table = Table(title=f"{model.name}, tp={tp}: tokens/s, and the ratio to the same without")
    numbers = [batch for batch, _ in _DECODES] + [_PREFILL]
    names = [f"{batch} decode at {context}" for batch, context in _DECODES]
    for column in ("mode", *(name for case in [*names, f"prefill of {_PREFILL}"] for name in (case, "ratio (spread)"))):
        table.add_column(column)
    for mode in Determinism:
        cells = []
        for number, seconds in zip(numbers, found, strict=True):
            ratios = [plain / ours for plain, ours in zip(seconds[Determinism.OFF], seconds[mode], strict=True)]
            rate = number / median(seconds[mode])
            cells += [f"{rate:.1f}", f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"]
        table.add_row(mode.value, *cells)
    console.print(table)


def _decode_seconds(gangs: dict[Determinism, GangSteps], batch: int, context: int) -> dict[Determinism, list[float]]:
    for steps in gangs.values():
        steps.admit(range(batch), context)
    return _in_turns(gangs, lambda steps: steps.decode())


def _in_turns(
    gangs: dict[Determinism, GangSteps], step: Callable[[GangSteps], float]
) -> dict[Determinism, list[float]]:
    """Seconds of each mode's steps; the first of each does not count."""
    found: dict[Determinism, list[float]] = {mode: [] for mode in gangs}
    for number in range(_NUM_STEPS + 1):
        for mode, steps in gangs.items():
            seconds = step(steps)
            found[mode] += [seconds] if number else []
    return found


if __name__ == "__main__":
    sys.exit(main())
