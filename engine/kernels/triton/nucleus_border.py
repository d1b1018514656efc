"""Top-p (nucleus) sampling's border (Holtzman et al., arXiv 1904.09751) without sorting.

The border is the least weight of which the tokens above it do not reach the goal together. Weights are integers, so it
is found exactly, by search: a program takes one row and compares all its weights with seven numbers at a time, which
settles three bits.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_BITS = 3


def nucleus_border(weights: torch.Tensor, goals: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[R, 1] int64: the weight of the last token of each row's nucleus, the fewest of the largest weights whose sum
    reaches the row's goal; 0 where all together do not.

    Args:
        weights: [R, vocab] int64, contiguous, from 0 to below 2 ** ``num_bits``.
        goals: [R, 1] float64.
    """
    assert weights.is_contiguous() and weights.dtype == torch.int64 and goals.dtype == torch.float64
    borders = torch.empty_like(goals, dtype=torch.int64)
    if len(borders):
        _nucleus_border[(len(borders),)](
            weights, goals.contiguous(), borders, weights.shape[1], -(-num_bits // _BITS), BLOCK=_BLOCK, BITS=_BITS
        )
    return borders


@triton.jit
def _nucleus_border(
    weights: tl.tensor,
    goals: tl.tensor,
    borders: tl.tensor,
    vocab_size: tl.tensor,
    num_rounds: tl.tensor,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    goal = tl.load(goals + row)
    digits = tl.arange(0, 2**BITS)
    low = tl.zeros([], tl.int64)
    for index in range(num_rounds):
        # The border is in [low, low + 8 × step): the tokens above low + digit × step − 1 reach the goal up to some
        # digit, which 0 always is.
        step = tl.full([], 1, tl.int64) << (BITS * (num_rounds - 1 - index)).to(tl.int64)
        above = low + digits * step - 1
        sums = tl.zeros([2**BITS], tl.int64)
        for first in range(0, vocab_size, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            values = tl.load(weights + row * vocab_size + ids, mask=ids < vocab_size, other=0)
            sums += tl.sum(tl.where(values[:, None] > above[None, :], values[:, None], 0), axis=0)
        reaches = (sums.to(tl.float64) >= goal) | (digits == 0)
        low += tl.max(tl.where(reaches, digits, 0), axis=0) * step
    tl.store(borders + row, low)
