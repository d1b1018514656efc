"""What surrounds the experts of a mixture, in bfloat16 on CPUs with tile units, a call each: the router's choice,
tokens sorted by expert, and their sums.

Each function returns None where it does not take its arguments: torch's own operations then do it. T tokens, E experts
in the model, K chosen for each token, N (token, expert) pairs of this rank, H hidden size.
"""

import ctypes
import functools
from enum import IntEnum
from typing import Any

import torch

from engine.kernels.native_library import tile_library

_STEP = 32


class Scoring(IntEnum):
    """How a router's logits become scores; the numbers are the library's (native/routing.cpp)."""

    SIGMOID = 0
    """Of the chosen."""
    SOFTMAX = 1
    """Over all."""
    NORMALIZED_SOFTMAX = 2
    """The same, divided by the sum over the chosen."""


def route(
    hidden: torch.Tensor, weight: torch.Tensor, num_chosen: int, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The K largest logits, which are rounded to bfloat16, of each token: expert ids [T, K] int64, largest first, and
    scores [T, K] float32. Of equal logits the lower id comes first.

    ``hidden``: [T, H]. ``weight``: [E, H].
    """
    library = _library()
    if library is None or not _is_taken(hidden) or not _is_taken(weight):
        return None
    hidden = hidden.contiguous()
    num_tokens, hidden_size = hidden.shape
    expert_ids = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
    scores = torch.empty(num_tokens, num_chosen, dtype=torch.float32)
    library.remuda_route(
        hidden.data_ptr(),
        weight.data_ptr(),
        num_tokens,
        hidden_size,
        weight.shape[0],
        num_chosen,
        scoring,
        expert_ids.data_ptr(),
        scores.data_ptr(),
    )
    return expert_ids, scores


def dispatch(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    local_experts: range,
    *,
    scales_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Inputs [N, H], sorted by expert and then by token, counts [local experts] int64, and of the pairs the tokens'
    rows [N] int64 and the scores [N] float32.

    ``hidden``: [T, H]. ``expert_ids``, ``scores``: [T, K] int64 and float32. ``scales_inputs``: whether a score
    multiplies its input.
    """
    library = _library()
    if library is None or not _is_taken(hidden) or scores.dtype is not torch.float32:
        return None
    hidden, expert_ids, scores = hidden.contiguous(), expert_ids.contiguous(), scores.contiguous()
    num_tokens, num_chosen = expert_ids.shape
    most = num_tokens * min(num_chosen, len(local_experts))
    inputs = hidden.new_empty(most, hidden.shape[1])
    counts = torch.empty(len(local_experts), dtype=torch.int64)
    token_rows, pair_scores = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.float32)
    num_pairs = library.remuda_dispatch(
        hidden.data_ptr(),
        expert_ids.data_ptr(),
        scores.data_ptr(),
        num_tokens,
        num_chosen,
        hidden.shape[1],
        local_experts.start,
        len(local_experts),
        scales_inputs,
        counts.data_ptr(),
        token_rows.data_ptr(),
        pair_scores.data_ptr(),
        inputs.data_ptr(),
    )
    return inputs[:num_pairs], counts, token_rows[:num_pairs], pair_scores[:num_pairs]


def combine(
    outputs: torch.Tensor, token_rows: torch.Tensor, num_tokens: int, scores: torch.Tensor | None
) -> torch.Tensor | None:
    """The sum by token of ``outputs`` [N, H], each multiplied by its score, in the order of the pairs and rounded once:
    [T, H].

    ``token_rows``: [N] int64. ``scores``: [N] float32, or None for none.
    """
    library = _library()
    if library is None or not _is_taken(outputs) or not (scores is None or scores.dtype is torch.float32):
        return None
    outputs, token_rows = outputs.contiguous(), token_rows.contiguous()
    scores = None if scores is None else scores.contiguous()
    combined = outputs.new_empty(num_tokens, outputs.shape[1])
    library.remuda_combine(
        outputs.data_ptr(),
        token_rows.data_ptr(),
        None if scores is None else scores.data_ptr(),
        len(outputs),
        num_tokens,
        outputs.shape[1],
        combined.data_ptr(),
    )
    return combined


def _is_taken(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" and tensor.shape[-1] % _STEP == 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = tile_library()
    if library is None:
        return None
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    flag: Any = ctypes.c_int32
    library.remuda_route.argtypes = [pointer] * 2 + [number] * 4 + [flag] + [pointer] * 2
    library.remuda_dispatch.argtypes = [pointer] * 3 + [number] * 5 + [flag] + [pointer] * 4
    library.remuda_combine.argtypes = [pointer] * 3 + [number] * 3 + [pointer]
    library.remuda_route.restype = library.remuda_combine.restype = None
    library.remuda_dispatch.restype = number
    return library
