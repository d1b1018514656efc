"""Chooses every row's next token. It keeps no state: a token is a function of the row's logits, options and history.

Order: penalties, logit_bias, ban on early stop tokens, grammar; then log-probabilities are read; then either the most
likely token (temperature 0; the lowest id among equals) or temperature, min-p, top-k, top-p and a draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.executor.draw import draw
from engine.executor.logprobs import top_logprobs
from engine.executor.penalties import adjust_logits
from engine.executor.sampling_row import SamplingRow
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
    """``logits`` [R, vocab] float32, which is changed in place; row r belongs to ``rows[r]``."""
    assert logits.dtype == torch.float32 and logits.shape[0] == len(rows)
    if not rows:
        return SamplerOutput([], [], [])
    adjust_logits(logits, rows)
    # amax hands on NaN, so one pass sees NaN, an infinity, and rows that are minus infinity throughout.
    valid = torch.isfinite(logits.amax(dim=-1)).tolist()
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [r for r, row in enumerate(rows) if row.params.temperature >= MIN_TEMPERATURE and valid[r]]
    if drawn:
        part = logits if len(drawn) == len(rows) else logits[drawn]
        for r, token_id in zip(drawn, draw(part, [rows[r] for r in drawn]).tolist(), strict=True):
            token_ids[r] = token_id
    for r, is_valid in enumerate(valid):
        if not is_valid:
            token_ids[r] = 0
    return SamplerOutput(token_ids, _logprobs(logits, rows, token_ids, valid), valid)


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
