"""Embeddings: what a rank makes of a prompt's final hidden states, chunk by chunk."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from engine.messages import PooledState, SlotError
from engine.request import Pooling
from engine.slot_table import ScheduledSlot


class Pooler:
    """Of the sampling rank. Sums are in float64, so that where a prompt was cut shows in the last bit at most."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        """By slot: of the hidden states of a prompt's positions so far, [hidden_size] float64."""

    def forget(self, slots: Sequence[int]) -> None:
        """They hold other requests, or none, from now on. One that enters again is computed from its beginning."""
        for slot in slots:
            self._sums.pop(slot, None)

    def take(
        self, hidden: torch.Tensor, scheduled: Sequence[ScheduledSlot]
    ) -> tuple[list[PooledState], list[SlotError]]:
        """What a step adds to embeddings: those that are complete, and those that cannot be.

        Args:
            hidden: [T, hidden_size], normalised, of the tokens in the order of ``scheduled``.
            scheduled: the step.
        """
        vectors: list[torch.Tensor] = []
        slots: list[int] = []
        end = 0
        for share in scheduled:
            start, end = end, end + share.num_tokens
            pooling = share.state.sampling.pooling
            if pooling is None:
                continue
            if pooling is Pooling.MEAN:
                self._add(share.slot, hidden[start:end])
            if share.embeds:
                vectors.append(self._sums.pop(share.slot) if pooling is Pooling.MEAN else hidden[end - 1].double())
                slots.append(share.slot)
        return _normalized(slots, vectors) if slots else ([], [])

    def _add(self, slot: int, rows: torch.Tensor) -> None:
        total = rows.sum(0, dtype=torch.float64)
        before = self._sums.get(slot)
        self._sums[slot] = total if before is None else before + total


def _normalized(slots: Sequence[int], vectors: Sequence[torch.Tensor]) -> tuple[list[PooledState], list[SlotError]]:
    """Brought to length 1, for which a sum need not be divided first."""
    matrix = functional.normalize(torch.stack(list(vectors)), dim=-1).float().cpu()
    rows = zip(slots, matrix.numpy().astype("<f4", copy=False), matrix.isfinite().all(-1).tolist(), strict=True)
    pooled, errors = [], []
    for slot, row, is_finite in rows:
        if is_finite:
            pooled.append(PooledState(slot, row.tobytes()))
        else:
            errors.append(SlotError(slot, "the prompt's hidden states are NaN or infinite"))
    return pooled, errors
