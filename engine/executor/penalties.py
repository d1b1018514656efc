"""Changes to logits that come before temperature: penalties, then logit_bias, then the ban on early stop tokens, then
what grammars forbid."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.executor.sampling_row import SamplingRow
from engine.executor.seen_tokens import SeenTokens
from engine.kernels.host_copy import to_device
from engine.request import SamplingParams


def adjust_logits(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """In place on ``logits`` [R, vocab] float32; row r belongs to ``rows[r]``. Rows without such options stay as is."""
    penalized = [r for r, row in enumerate(rows) if has_penalties(row.params)]
    if penalized:
        _apply_penalties(logits, rows, penalized)
    biased = [(r, token_id, bias) for r, row in enumerate(rows) for token_id, bias in row.params.logit_bias.items()]
    if biased:
        row_ids, token_ids, biases = zip(*biased, strict=True)
        values = to_device(np.array(biases, dtype=np.float32), logits.device)
        logits.index_put_(_places(row_ids, token_ids, logits.device), values, accumulate=True)
    banned = [
        (r, token_id)
        for r, row in enumerate(rows)
        if row.num_output_tokens < row.params.min_tokens and not (row.mask and row.mask.only_ends)
        for token_id in row.params.stop_token_ids
        if token_id < logits.shape[1]
    ]
    if banned:
        row_ids, token_ids = zip(*banned, strict=True)
        places = _places(row_ids, token_ids, logits.device)
        logits.index_put_(places, logits.new_full((), float("-inf")))
    for r, row in enumerate(rows):
        if row.mask is not None:  # one by one: gathering the rows would copy the logits twice
            logits[r].masked_fill_(to_device(~row.mask.allowed, logits.device), float("-inf"))


def _places(row_ids: Sequence[int], token_ids: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(to_device(np.array((row_ids, token_ids), dtype=np.int64), device))


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _apply_penalties(logits: torch.Tensor, rows: Sequence[SamplingRow], penalized: list[int]) -> None:
    """Repetition (Keskar et al. 2019, CTRL, §4.1): a token seen in prompt or output has its logit divided by the
    penalty where positive, multiplied where not. Frequency and presence (OpenAI): of output tokens only, the count and
    one are subtracted. Only the tokens that occur are touched, so the cost follows how many there are."""
    parts = [_seen_tokens(rows[r]) for r in penalized]
    sizes = [len(token_ids) for token_ids, _ in parts]
    all_ids, all_counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    row_ids, token_ids = to_device(np.stack((np.repeat(penalized, sizes), all_ids)), logits.device)
    counts = to_device(all_counts, logits.device).to(logits.dtype)

    def spread(values: list[float]) -> torch.Tensor:
        return to_device(np.repeat(values, sizes).astype(np.float32), logits.device)

    params = [rows[r].params for r in penalized]
    repetition = spread([p.repetition_penalty for p in params])
    values = logits[row_ids, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([p.frequency_penalty for p in params]) * counts
    values -= spread([p.presence_penalty for p in params]) * (counts > 0)
    logits[row_ids, token_ids] = values


def _seen_tokens(row: SamplingRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    seen = row.seen or SeenTokens()
    seen.feed(row.token_ids, row.num_prompt_tokens)
    return seen.token_ids, seen.counts
