"""What counts as equal to a golden record, and that the embedded model's own is sound."""

import math
from pathlib import Path

from engine.weights.golden import GoldenStep, fault_of, read_golden
from engine.weights.identity import checkpoint_identity

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"


def test_the_embedded_models_golden_file_is_of_its_files() -> None:
    golden = read_golden(TINY)
    assert golden is not None
    assert golden.checkpoint == checkpoint_identity(TINY)


def test_tolerance_and_ties() -> None:
    expected = GoldenStep(1, [(1, -0.7), (2, -0.71), (3, -4.0)])
    assert fault_of(expected, GoldenStep(2, [(2, -0.70), (1, -0.705), (3, -4.01)]), 0.02) is None
    assert fault_of(expected, GoldenStep(3, [(1, -0.7), (2, -0.71), (3, -4.0)]), 0.02) == "expected token 1, found 3"
    assert "of token 2, found -0.760" in str(fault_of(expected, GoldenStep(1, [(1, -0.7), (2, -0.76)]), 0.02))
    assert "of token 1, found at most -4.000" in str(fault_of(expected, GoldenStep(3, [(3, -4.0)]), 0.02))
    assert fault_of(expected, GoldenStep(1, [(1, math.nan)]), 0.02) == "expected finite logits, found others"
