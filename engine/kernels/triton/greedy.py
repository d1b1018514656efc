"""The most likely token of each row, and whether the row is of any use, in one pass over the logits."""

import torch
import triton
import triton.language as tl

_BLOCK = 4096


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[R] int64: the column of each row's maximum in ``logits`` [R, vocab] float32, the lowest among equals.

    −1 where the maximum is no finite number: a NaN or an infinity among the logits, or nothing but minus infinity.
    """
    assert logits.is_contiguous() and logits.dtype == torch.float32
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(tokens):
        _greedy[(len(tokens),)](logits, tokens, logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return tokens


@triton.jit
def _greedy(logits: tl.tensor, tokens: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    columns = tl.zeros([BLOCK], tl.int32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, vocab_size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        values = tl.load(logits + row * vocab_size + ids, mask=ids < vocab_size, other=float("-inf"))
        has_nan = has_nan | (values != values).to(tl.int32)
        is_larger = values > largest
        largest = tl.where(is_larger, values, largest)
        columns = tl.where(is_larger, ids, columns)
    best = tl.max(largest, axis=0)
    token = tl.min(tl.where(largest == best, columns, vocab_size), axis=0)
    is_usable = (tl.max(has_nan, axis=0) == 0) & (best < float("inf")) & (best > float("-inf"))
    tl.store(tokens + row, tl.where(is_usable, token, -1).to(tl.int64))
