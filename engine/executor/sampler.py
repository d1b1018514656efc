"""Chooses every row's next token. It keeps no state: a token is a function of the row's logits, options and history.

Order: penalties, logit_bias, ban on early stop tokens, grammar; then log-probabilities are read; then either the most
likely token (temperature 0; the lowest id among equals) or temperature, min-p, top-k, top-p and a draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.executor.draw import draw
from engine.executor.logprobs import top_logprobs
from engine.executor.penalties import adjust_logits
from engine.executor.sampling_row import SamplingRow
from engine.kernels.host_copy import to_device
from engine.kernels.sampling import most_likely
from engine.request import MIN_TEMPERATURE, TopLogprobs


@dataclass(frozen=True)
class SamplerOutput:
    """Per row: the token, its log-probabilities where asked for, and whether its logits were usable.

    Where ``valid`` is false (a NaN, an infinity, or nothing but minus infinity) the token is 0 and means nothing.
    """

    token_ids: list[int]
    logprobs: list[TopLogprobs | None]
    valid: list[bool]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SamplerOutput:
    """``logits`` [R, vocab] float32, which is changed in place; row r belongs to ``rows[r]``. Waits for the device."""
    if not rows:
        return SamplerOutput([], [], [])
    output = output_of(choose(logits, rows).tolist())
    return replace(output, logprobs=_logprobs(logits, rows, output.token_ids, output.valid))


def choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """[R] int64 on the device of ``logits``, for which nobody waits; −1 where a row is of no use. As ``sample``, of one
    row or more."""
    assert logits.dtype == torch.float32 and logits.shape[0] == len(rows)
    adjust_logits(logits, rows)
    tokens = most_likely(logits)
    drawn = [r for r, row in enumerate(rows) if row.params.temperature >= MIN_TEMPERATURE]
    if len(drawn) == len(rows):
        return torch.where(tokens < 0, tokens, draw(logits, rows))
    if drawn:
        index = to_device(np.array(drawn), logits.device)
        found = draw(logits[index], [rows[r] for r in drawn])
        tokens[index] = torch.where(tokens[index] < 0, -1, found)
    return tokens


def output_of(tokens: list[int]) -> SamplerOutput:
    """Of what ``choose`` gave, without log-probabilities."""
    valid = [token_id >= 0 for token_id in tokens]
    return SamplerOutput([max(token_id, 0) for token_id in tokens], [None] * len(tokens), valid)


def _logprobs(
    logits: torch.Tensor, rows: Sequence[SamplingRow], token_ids: list[int], valid: list[bool]
) -> list[TopLogprobs | None]:
    result: list[TopLogprobs | None] = [None] * len(rows)
    asked = {r: row.params.logprobs for r, row in enumerate(rows) if row.params.logprobs is not None and valid[r]}
    if asked:
        found = top_logprobs(logits[list(asked)], [token_ids[r] for r in asked], list(asked.values()))
        for r, entry in zip(asked, found, strict=True):
            result[r] = entry
    return result
