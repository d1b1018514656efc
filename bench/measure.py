"""What all benchmarks share: medians with their spread, and rows with a ratio to a same-run reference."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of repetitions, and the smallest and largest of them."""

    median: float
    low: float
    high: float
    num_repetitions: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Row:
    """One figure: ours, the reference measured in the same run in the same unit, and their ratio.

    ``ratio`` is the spread of the ratios of neighbouring repetitions, not the ratio of the medians: what slowed the
    machine for a while slowed both.
    """

    benchmark: str
    case: str
    unit: str
    ours: Spread
    reference: Spread
    ratio: Spread
    better: str
    """``higher`` or ``lower``: which ratio is the better one."""
    notes: str = ""
    clean_of_all: tuple[int, int] | None = None
    """Where a benchmark tells disturbed repetitions apart: pairs in which both sides were clean, and pairs in all. The
    figures are of the clean ones, or of all where none was."""


def row(
    benchmark: str,
    case: str,
    unit: str,
    ours: list[float],
    reference: list[float],
    better: str,
    notes: str = "",
) -> Row:
    """``ours[i]`` and ``reference[i]`` were measured next to one another."""
    assert len(ours) == len(reference) and better in ("higher", "lower")
    ratios = [mine / theirs for mine, theirs in zip(ours, reference, strict=True)]
    return Row(benchmark, case, unit, Spread.of(ours), Spread.of(reference), Spread.of(ratios), better, notes)


def in_turns(measurements: Mapping[str, Callable[[], float]], num_repetitions: int) -> dict[str, list[float]]:
    """Runs all measurements once, then all again, so that slow drift of the machine hits all alike."""
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(num_repetitions):
        for name, measure in measurements.items():
            values[name].append(measure())
    return values
