"""Ratios are taken pair by pair."""

import pytest

from bench.measure import Spread, row


def test_a_slow_moment_of_the_machine_leaves_the_ratio_alone() -> None:
    found = row("b", "c", "µs", ours=[10.0, 40.0, 11.0], reference=[5.0, 20.0, 5.0], better="lower")
    assert found.ratio == Spread(2.0, 2.0, 2.2, 3)
    assert found.ours == Spread(11.0, 10.0, 40.0, 3)
    assert found.reference.median == 5.0


def test_unpaired_figures_are_refused() -> None:
    with pytest.raises(AssertionError):
        row("b", "c", "µs", ours=[1.0], reference=[1.0, 2.0], better="lower")
    with pytest.raises(AssertionError):
        row("b", "c", "µs", ours=[1.0], reference=[1.0], better="faster")
