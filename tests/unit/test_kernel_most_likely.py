"""Greedy sampling's pass over the logits against torch's argmax."""

import math

import pytest
import torch

from engine.kernels.sampling import most_likely


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 1000, 32768])
def test_the_most_likely_token(vocab_size: int) -> None:
    logits = torch.randn(9, vocab_size + 5)[:, :vocab_size]
    assert torch.equal(most_likely(logits), logits.argmax(dim=-1))


def test_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 100)
    logits[1, [40, 33, 65]] = 2.0
    logits[2, :37] = -math.inf
    assert most_likely(logits).tolist() == [0, 33, 37]


@pytest.mark.parametrize("column", [0, 7, 16, 49])
def test_unusable_logits(column: int) -> None:
    logits = torch.randn(4, 50)
    logits[0, column] = math.nan
    logits[1, column] = math.inf
    logits[2] = -math.inf
    logits[3, column] = -math.inf
    expected = [-1, -1, -1, int(logits[3].argmax())]
    assert most_likely(logits).tolist() == expected
