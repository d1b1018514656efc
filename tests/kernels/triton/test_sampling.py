"""The sampler's kernels, whose answers are exact, against torch and a sort."""

import math

import pytest
import torch

from engine.kernels.triton.greedy import greedy
from engine.kernels.triton.nucleus_border import nucleus_border
from tests.kernels.triton.references import DEVICE

NUM_BITS = 37


@pytest.mark.parametrize("vocab_size", [1, 100, 4096, 9000])
def test_the_most_likely_token(vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size).round(decimals=1).to(DEVICE)
    logits[1] = -torch.inf
    logits[1, vocab_size // 2] = -3.0
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert greedy(logits).tolist() == expected, "the lowest id among equals"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 4095, 4096, 8191, 8999])
def test_rows_that_are_of_no_use(bad: float, column: int) -> None:
    logits = torch.randn(3, 9000).to(DEVICE)
    logits[0, column] = bad
    logits[2] = -torch.inf
    assert [token == -1 for token in greedy(logits).tolist()] == [True, False, True]


def border_by_sorting(weights: list[int], goal: float) -> int:
    total = 0
    for weight in sorted(weights, reverse=True):
        total += weight
        if total >= goal:
            return weight
    return 0


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999999])
def test_the_border_of_the_nucleus(top_p: float) -> None:
    """Peaked and flat rows, ties, zeros and the largest weight there is."""
    relative = torch.stack([torch.randn(5000) * scale for scale in (0.0, 0.1, 2.0, 20.0)])
    relative = (relative - relative.amax(-1, keepdim=True)).exp()
    weights = (relative.mul_(2.0**36)).to(torch.int64).to(DEVICE)
    weights[2] = weights[2] >> 30
    goals = top_p * weights.sum(dim=-1, keepdim=True).double()
    found = nucleus_border(weights, goals, NUM_BITS)
    expected = [border_by_sorting(row, goal) for row, (goal,) in zip(weights.tolist(), goals.tolist(), strict=True)]
    assert found[:, 0].tolist() == expected
