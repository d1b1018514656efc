"""The tensors of one forward pass, built by the model runner from a step plan, read by models and attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch


@dataclass(frozen=True)
class StepAdapters:
    """Which rows of a matrix, one row per token, belong to which LoRA adapter. Never without any.

    slots: [rows] int64, each row's adapter slot, negative for none.
    rows: every slot that may occur, with its rows' numbers [n] int64, ascending. n may be 0.
    """

    slots: torch.Tensor
    rows: tuple[tuple[int, torch.Tensor], ...]

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device) -> Self | None:
        """None where no row has an adapter."""
        present = sorted({slot for slot in slots if slot >= 0})
        if not present:
            return None
        on_host = torch.tensor(slots, dtype=torch.int64)
        rows = [(slot, torch.nonzero(on_host == slot).squeeze(1).to(device)) for slot in present]
        return cls(on_host.to(device), tuple(rows))

    def select(self, index: torch.Tensor) -> Self:
        """For a matrix made of the rows ``index`` [n] int64 of this one."""
        slots = self.slots[index]
        return type(self)(slots, tuple((slot, torch.nonzero(slots == slot).squeeze(1)) for slot, _ in self.rows))

    def part(self, rows: slice) -> Self | None:
        """For neighbouring rows of this matrix; None where none of them has an adapter."""
        slots = self.slots[rows]
        return self.of(slots.tolist(), slots.device)

    def split(self, counts: Sequence[int]) -> list[Self]:
        """For the parts of ``counts`` rows, one after another, into which this matrix is cut."""
        borders = [0, *accumulate(counts)]
        cuts = {
            slot: torch.searchsorted(rows, torch.tensor(borders, device=rows.device)).tolist()
            for slot, rows in self.rows
        }
        return [
            type(self)(
                self.slots[first:last],
                tuple((slot, rows[cuts[slot][part] : cuts[slot][part + 1]] - first) for slot, rows in self.rows),
            )
            for part, (first, last) in enumerate(pairwise(borders))
        ]


@dataclass(frozen=True)
class ForwardBatch:
    """Scheduled tokens of all requests, one after another. T tokens, B requests, G KV groups.

    Shapes and dtypes (all on the model's device unless said otherwise):
        token_ids: [T] int64.
        positions: [T] int64, position of each token in its request.
        query_lens: B Python ints, tokens of each request in this step (sum T).
        kv_lens: B Python ints, positions valid after this step (start + query_len).
        block_tables: G tensors [B, max blocks] int64, padded with NULL_BLOCK.
        slot_mapping: G tensors [T] int64, where each token's key and value go: block id × block_size + offset.
        logits_rows: [R] int64, rows of [T] whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_tables: tuple[torch.Tensor, ...]
    slot_mapping: tuple[torch.Tensor, ...]
    logits_rows: torch.Tensor
    prompt_lens: tuple[int, ...] = ()
    """B Python ints, length of each request's prompt (its first ``num_prompt_tokens``, whatever was generated since).
    Read by dynamic NTK rotary embedding alone, whose frequencies depend on it; may be left out for other models."""
    adapters: StepAdapters | None = None
    """None: no request of this step has a LoRA adapter."""
