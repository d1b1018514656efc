"""The routed experts of few tokens, where reading the experts' matrices is what takes the time: two launches, no
sorting and no count that the host would have to wait for.

The tokens of an expert are multiplied together, so each chosen expert's matrices are read once, as in grouped products
(MegaBlocks, arXiv 2211.15841). Every program finds its expert's tokens by itself among the at most ``MOST_PAIRS``
(token, expert) pairs. T tokens, K experts per token, N = T × K pairs, E local experts, H hidden size, I expert width.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import cdiv, dot_dtype, power_of_2

MOST_PAIRS = 256
_TOKENS = 16
"""That a program multiplies at once: the fewest that tl.dot takes."""
_OUTPUTS = 32
_INPUTS = 128


def routed_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    gate_up_weights: torch.Tensor,
    down_weights: torch.Tensor,
    first_expert: int,
    *,
    scales_inputs: bool,
) -> torch.Tensor:
    """[T, H]: each token's sum over those of its experts that are here. At most MOST_PAIRS pairs.

    Rounded as experts one by one would be: scaled inputs, gate and up, their product, outputs, scaled outputs.

    Args:
        hidden: [T, H], bfloat16 or float32, as the weights.
        expert_ids: [T, K] int64, global.
        scores: [T, K] float32. They multiply the experts' inputs or outputs.
        gate_up_weights: [E, 2 × I, H], gate first; down_weights: [E, H, I]; both contiguous.
        first_expert: the global number of the first of E.
    """
    num_tokens, num_choices = expert_ids.shape
    num_experts, size, width = down_weights.shape
    num_pairs = num_tokens * num_choices
    assert num_pairs <= MOST_PAIRS and gate_up_weights.is_contiguous() and down_weights.is_contiguous()
    if num_pairs == 0:
        return torch.zeros_like(hidden)
    hidden, expert_ids, scores = hidden.contiguous(), expert_ids.contiguous(), scores.float().contiguous()
    inner = hidden.new_empty(num_pairs, width)
    outputs = hidden.new_zeros(num_tokens, num_choices, size)
    candidates = min(num_pairs, num_experts)
    shared: dict[str, Any] = {
        "BY_PAIR": num_pairs <= num_experts,
        "PAIRS": power_of_2(num_pairs, _TOKENS),
        "TOKENS": _TOKENS,
        "OUTPUTS": _OUTPUTS,
        "INPUTS": _INPUTS,
        "DOT": dot_dtype(hidden.dtype),
        "num_warps": 4,
        "num_stages": 3,
    }
    numbers = (num_pairs, num_experts, first_expert, num_choices, size, width)
    _gate_up[(candidates, cdiv(width, _OUTPUTS))](
        hidden, expert_ids, scores, gate_up_weights, inner, *numbers, SCALES=scales_inputs, **shared
    )
    _down[(candidates, cdiv(size, _OUTPUTS))](
        inner, expert_ids, scores, down_weights, outputs, *numbers, SCALES=not scales_inputs, **shared
    )
    return outputs[:, 0] if num_choices == 1 else outputs.sum(dim=1)


@triton.jit
def _find_pairs(
    expert_ids: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    first_expert: tl.tensor,
    BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
) -> Any:
    """This program's local expert, how many pairs are its (0 where another program takes them), and of each of PAIRS
    its place among them, −1 for others'."""
    candidate = tl.program_id(0)
    pairs = tl.arange(0, PAIRS)
    ids = tl.load(expert_ids + pairs, mask=pairs < num_pairs, other=-1) - first_expert
    is_local = (pairs < num_pairs) & (ids >= 0) & (ids < num_experts)
    expert = candidate.to(tl.int64)
    if BY_PAIR:
        expert = tl.load(expert_ids + candidate) - first_expert
    is_ours = is_local & (ids == expert)
    if BY_PAIR:
        # The first of an expert's pairs stands for all.
        is_ours = is_ours & (tl.min(tl.where(is_ours, pairs, PAIRS), axis=0) == candidate)
    ours = is_ours.to(tl.int32)
    places = tl.where(is_ours, tl.cumsum(ours, axis=0) - 1, -1)
    return expert, tl.sum(ours, axis=0), places


@triton.jit
def _pairs_at(places: tl.tensor, first: tl.tensor, PAIRS: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """The numbers of the TOKENS pairs from place ``first``, and whether there are so many."""
    wanted = first + tl.arange(0, TOKENS)
    is_it = places[None, :] == wanted[:, None]
    pairs = tl.sum(tl.where(is_it, tl.arange(0, PAIRS)[None, :], 0), axis=1)
    return pairs.to(tl.int64), tl.sum(is_it.to(tl.int32), axis=1) > 0


@triton.jit
def _gate_up(
    hidden: tl.tensor,
    expert_ids: tl.tensor,
    scores: tl.tensor,
    weights: tl.tensor,
    inner: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    first_expert: tl.tensor,
    num_choices: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    SCALES: tl.constexpr,
    BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """``inner`` [N, I]: silu(gate) · up of each pair."""
    expert, count, places = _find_pairs(expert_ids, num_pairs, num_experts, first_expert, BY_PAIR, PAIRS)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    gates = weights + (expert * 2 * width + columns)[None, :] * size
    ups = gates + width.to(tl.int64) * size
    dtype: tl.constexpr = inner.dtype.element_ty
    for first in range(0, count, TOKENS):
        pairs, is_pair = _pairs_at(places, first, PAIRS, TOKENS)
        score = tl.load(scores + pairs, mask=is_pair, other=0.0)
        gate = tl.zeros([TOKENS, OUTPUTS], tl.float32)
        up = tl.zeros([TOKENS, OUTPUTS], tl.float32)
        for start in range(0, size, INPUTS):
            inputs = start + tl.arange(0, INPUTS)
            offsets = (pairs // num_choices)[:, None] * size + inputs[None, :]
            mask = is_pair[:, None] & (inputs[None, :] < size)
            x = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
            if SCALES:
                x = (x * score[:, None]).to(dtype).to(tl.float32)
            x = x.to(DOT)
            mask = (inputs[:, None] < size) & (columns[None, :] < width)
            w = tl.load(gates + inputs[:, None], mask=mask, other=0.0).to(tl.float32).to(DOT)
            gate += tl.dot(x, w, input_precision="ieee")
            w = tl.load(ups + inputs[:, None], mask=mask, other=0.0).to(tl.float32).to(DOT)
            up += tl.dot(x, w, input_precision="ieee")
        gate = gate.to(dtype).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        product = (activated * up.to(dtype).to(tl.float32)).to(dtype)
        mask = is_pair[:, None] & (columns[None, :] < width)
        tl.store(inner + pairs[:, None] * width + columns[None, :], product, mask=mask)


@triton.jit
def _down(
    inner: tl.tensor,
    expert_ids: tl.tensor,
    scores: tl.tensor,
    weights: tl.tensor,
    outputs: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    first_expert: tl.tensor,
    num_choices: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    SCALES: tl.constexpr,
    BY_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """``outputs`` [N, H] of each pair; pairs of experts elsewhere stay as they are."""
    expert, count, places = _find_pairs(expert_ids, num_pairs, num_experts, first_expert, BY_PAIR, PAIRS)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    matrix = weights + (expert * size + columns)[None, :] * width
    dtype: tl.constexpr = outputs.dtype.element_ty
    for first in range(0, count, TOKENS):
        pairs, is_pair = _pairs_at(places, first, PAIRS, TOKENS)
        result = tl.zeros([TOKENS, OUTPUTS], tl.float32)
        for start in range(0, width, INPUTS):
            inputs = start + tl.arange(0, INPUTS)
            mask = is_pair[:, None] & (inputs[None, :] < width)
            x = tl.load(inner + pairs[:, None] * width + inputs[None, :], mask=mask, other=0.0).to(tl.float32).to(DOT)
            mask = (inputs[:, None] < width) & (columns[None, :] < size)
            w = tl.load(matrix + inputs[:, None], mask=mask, other=0.0).to(tl.float32).to(DOT)
            result += tl.dot(x, w, input_precision="ieee")
        rounded = result.to(dtype)
        if SCALES:
            score = tl.load(scores + pairs, mask=is_pair, other=0.0)
            rounded = (rounded.to(tl.float32) * score[:, None]).to(dtype)
        mask = is_pair[:, None] & (columns[None, :] < size)
        tl.store(outputs + pairs[:, None] * size + columns[None, :], rounded, mask=mask)
