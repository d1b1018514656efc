"""Log-probabilities of chosen tokens and of the most likely ones."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.request import TopLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def top_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TopLogprobs]:
    """For each row of ``logits`` [R, vocab] float32: the chosen token's log-probability and rank, and the
    ``num_top[r]`` most likely tokens, best first, lower ids first among equals (bfloat16 models have many of those)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logits > chosen).sum(dim=-1).add_(1).tolist()
    chosen_logprobs = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]
    chosen_list = chosen_logprobs.clamp_(min=MIN_LOGPROB).tolist()
    best = _most_likely(logits, logprobs, num_top)
    return [
        TopLogprobs(logprob, rank, ids, values)
        for logprob, rank, (ids, values) in zip(chosen_list, ranks, best, strict=True)
    ]


def _most_likely(
    logits: torch.Tensor, logprobs: torch.Tensor, num_top: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Everything at least as likely as a row's k-th is sorted by (value, id): topk alone leaves ties undefined."""
    most = min(max(num_top, default=0), logits.shape[1])
    if not most:
        return [([], [])] * len(num_top)
    border = logits.topk(most, dim=-1, sorted=True).values[:, -1:]
    row_ids, token_ids = (logits >= border).nonzero(as_tuple=True)
    values = logits[row_ids, token_ids].cpu().numpy()
    found = logprobs[row_ids, token_ids].clamp_(min=MIN_LOGPROB).cpu().numpy()
    rows, ids = row_ids.cpu().numpy(), token_ids.cpu().numpy()
    order = np.lexsort((ids, -values, rows))
    starts = np.searchsorted(rows, np.arange(len(num_top)))
    result = []
    for start, count in zip(starts, num_top, strict=True):
        picked = order[start : start + min(count, most)]
        result.append((ids[picked].tolist(), found[picked].tolist()))
    return result
