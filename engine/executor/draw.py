"""Temperature, truncation (min-p, top-k, top-p) and the draw itself, for rows with a temperature above 0.

Probabilities are held as integers (2**36 for the most likely token). Integer sums do not depend on their order, so a
row's result depends neither on the batch around it nor on how a device parallelises sums. What is below 2**-36 of the
most likely token is lost, which no test of the distribution could see.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.executor.philox import uniforms
from engine.executor.sampling_row import SamplingRow
from engine.kernels.host_copy import to_device
from engine.kernels.sampling import gpu_nucleus_border
from engine.request import SamplingParams

_SCALE = 2.0**36
_NUM_BITS = 37
"""Of a weight."""
_NUM_CANDIDATES = (64, 1024)
"""Top-p looks for its border among so many most likely tokens before it sorts the whole vocabulary."""


def draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """[R] int64 tokens on the device of ``logits`` [R, vocab] float32 (after penalties). Of a row whose maximum is not
    finite, the token is some number of the vocabulary.

    The token is the inverse of the cumulative distribution, in order of ids, at a number that depends only on the row's
    seed, choice and position.
    """
    cumulative = kept_weights(logits, [row.params for row in rows]).cumsum(dim=-1)
    totals = cumulative[:, -1]
    numbers = uniforms(
        [row.params.seed for row in rows], [row.params.choice for row in rows], [row.position for row in rows]
    )
    targets = (to_device(numbers, logits.device) * totals).to(torch.int64)
    targets = torch.minimum(targets, totals - 1)
    tokens = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[1] - 1)


def kept_weights(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[R, vocab] int64, proportional to the probabilities; 0 for what truncation removed.

    In this order: temperature, min-p, top-k, top-p (of what the others left). Tokens as likely as the last one kept are
    kept too, so the kept set never depends on how ties are sorted.
    """

    def column(values: list[float]) -> torch.Tensor:
        return to_device(np.array(values, dtype=np.float32), logits.device)[:, None]

    vocab_size = logits.shape[1]
    relative = (logits - logits.amax(dim=-1, keepdim=True)).div_(column([p.temperature for p in params]))
    relative.exp_()
    if any(p.min_p > 0.0 for p in params):
        relative.masked_fill_(relative < column([p.min_p for p in params]), 0.0)
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    limited = [r for r, k in enumerate(top_k) if k < vocab_size]
    if limited:
        index = to_device(np.array(limited), logits.device)
        part = logits[index]
        border = _kth_largest(part, [top_k[r] for r in limited])
        relative[index] = relative[index].masked_fill(part < border, 0.0)
    weights = relative.mul_(_SCALE).to(torch.int64)
    nucleus = [r for r, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        index = to_device(np.array(nucleus), logits.device)
        part = weights[index]
        border = _nucleus_border(part, [params[r].top_p for r in nucleus])
        weights[index] = part.masked_fill(part < border, 0)
    return weights


def _kth_largest(logits: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """[R, 1]: each row's k-th largest value."""
    largest = logits.topk(max(top_k), dim=-1, sorted=True).values
    return largest.gather(1, to_device(np.array(top_k), logits.device)[:, None] - 1)


def _nucleus_border(weights: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """[R, 1]: weight of the last token of each row's nucleus: the fewest most likely tokens whose probabilities reach
    top_p together (Holtzman et al. 2019)."""
    goals = to_device(np.array(top_p, dtype=np.float64), weights.device)[:, None]
    goals = goals * weights.sum(dim=-1, keepdim=True)
    found = gpu_nucleus_border(weights, goals, _NUM_BITS)
    if found is not None:
        return found
    for num_candidates in _NUM_CANDIDATES:
        if num_candidates < weights.shape[1]:
            descending = weights.topk(num_candidates, dim=-1, sorted=True).values
            if bool((descending.sum(dim=-1, keepdim=True) >= goals).all()):
                break
    else:
        descending = weights.sort(dim=-1, descending=True).values
    before = descending.cumsum(dim=-1) - descending
    num_kept = (before < goals).sum(dim=-1, keepdim=True).clamp_(min=1)
    return descending.gather(1, num_kept - 1)
