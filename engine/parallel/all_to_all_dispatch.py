"""Tokens to the ranks of their experts and back, where attention is data-parallel: each dp group has tokens of its own.

A (token, expert) pair is a row that goes to all expert_tp ranks which together hold one copy of the expert, and comes
back from each of them as a summand. Within a dp group, whose ranks hold the same tokens, each sends a share of them.

T tokens of this rank, K experts per token, P = T × K × expert_tp rows sent, N rows received, H hidden size.
"""

from dataclasses import dataclass

import torch

from engine.batch import StepAdapters
from engine.messages import NO_ADAPTER
from engine.parallel.collectives import ReceivedRows
from engine.parallel.expert_table import ExpertTable
from engine.parallel.mesh import Mesh
from engine.parallel.token_dispatch import ExpertTokens, scaled

_LABELS = torch.int32
_LABEL_BYTES = 2 * _LABELS.itemsize
"""Behind each row: the slot of its expert on the receiving rank, and the slot of its adapter."""


class AllToAllDispatch:
    """See TokenDispatch. ``combine`` gives the whole sum of this rank's share: nothing is left to be reduced but the
    shares themselves.

    Args:
        table: which slots hold which experts.
        scales_inputs: whether a score multiplies an expert's input; its output otherwise.
    """

    def __init__(self, mesh: Mesh, table: ExpertTable, *, scales_inputs: bool) -> None:
        self._stage = mesh.stage
        self._tp, self._tp_rank, self._expert_tp = mesh.config.tp, mesh.tp_rank, mesh.config.expert_tp
        self._scales_inputs = scales_inputs
        self._table, self._num_slots = table, table.num_slots

    def share(self, num_tokens: int) -> slice:
        first, end = (num_tokens * rank // self._tp for rank in (self._tp_rank, self._tp_rank + 1))
        return slice(first, end)

    def dispatch(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
        adapters: StepAdapters | None = None,
    ) -> "ExchangedTokens":
        """Posts the rows; see TokenDispatch."""
        num_tokens, num_chosen = expert_ids.shape
        expert_ids, by_expert = expert_ids.sort(dim=1)
        scores = scores.gather(1, by_expert)
        place = self._table.slots(expert_ids)  # [T, K]
        parts = torch.arange(self._expert_tp, device=hidden.device)
        receiver = ((place // self._num_slots)[:, :, None] * self._expert_tp + parts).flatten()
        slot = (place % self._num_slots)[:, :, None].expand(-1, -1, self._expert_tp).flatten()
        order = torch.argsort(receiver * self._num_slots + slot, stable=True)
        pairs = order // self._expert_tp
        token_rows = pairs // num_chosen
        tokens = hidden[token_rows]
        if self._scales_inputs:
            tokens = scaled(tokens, scores.flatten()[pairs])
        adapter = torch.full_like(slot, NO_ADAPTER) if adapters is None else adapters.slots[token_rows]
        labels = torch.stack([slot[order], adapter], dim=1).to(_LABELS)
        counts = torch.bincount(receiver, minlength=self._stage.size).cpu()
        rows = torch.cat([tokens.view(torch.uint8), labels.view(torch.uint8)], dim=1)
        sent = _Sent(order, counts, (num_tokens, num_chosen, self._expert_tp), None if self._scales_inputs else scores)
        return ExchangedTokens(self, sent, hidden.dtype, self._stage.post_rows(rows, counts))

    def receive(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[ExpertTokens, torch.Tensor]:
        """From rows with labels, in the order of their arrival: what the experts get, and each one's place among the
        arrived."""
        labels = rows[:, -_LABEL_BYTES:].contiguous().view(_LABELS).long()
        order = torch.argsort(labels[:, 0], stable=True)
        tokens = rows[order, :-_LABEL_BYTES].view(dtype)
        counts = torch.bincount(labels[:, 0], minlength=self._num_slots)
        adapters = None
        if (labels[:, 1] != NO_ADAPTER).any():
            adapters = StepAdapters.of(labels[order, 1].tolist(), rows.device)
        return ExpertTokens(tokens, counts, adapters), order

    def send_back(self, outputs: torch.Tensor, received: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """[N, H] in the order of arrival to [P, H] in the order of sending; counts of both by rank."""
        return self._stage.post_rows(outputs, received, sent)()[0]


@dataclass(frozen=True)
class _Sent:
    """``order`` [P]: of the rows among (token, its experts in ascending order, expert_tp rank), whose numbers are
    ``shape``; ``counts``: by receiver; ``scores`` [T, K]: factors on the outputs, if any."""

    order: torch.Tensor
    counts: torch.Tensor
    shape: tuple[int, int, int]
    scores: torch.Tensor | None


class ExchangedTokens:
    """See Dispatched."""

    def __init__(self, dispatch: AllToAllDispatch, sent: _Sent, dtype: torch.dtype, rows: ReceivedRows) -> None:
        self._dispatch, self._sent, self._dtype = dispatch, sent, dtype
        self._rows: ReceivedRows | None = rows
        self._order = self._received = torch.empty(0, dtype=torch.int64)

    def receive(self) -> ExpertTokens:
        assert self._rows is not None, "received once"
        rows, self._received = self._rows()
        self._rows = None  # it holds what was sent
        arrived, self._order = self._dispatch.receive(rows, self._dtype)
        return arrived

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        """Always in the same order, in float32 and rounded once: the result depends neither on which ranks compute nor
        on what else is computed."""
        sent = self._sent
        by_arrival = torch.empty_like(outputs)
        by_arrival[self._order] = outputs
        returned = self._dispatch.send_back(by_arrival, self._received, sent.counts)
        summands = torch.empty_like(returned)
        summands[sent.order] = returned
        summands = summands.view(*sent.shape, outputs.shape[1])
        total = torch.zeros(sent.shape[0], outputs.shape[1], dtype=torch.promote_types(outputs.dtype, torch.float32))
        total = total.to(outputs.device)
        for chosen in range(sent.shape[1]):
            whole = summands[:, chosen, 0].to(total.dtype)
            for part in range(1, sent.shape[2]):
                whole = whole + summands[:, chosen, part]
            total += whole if sent.scores is None else whole * sent.scores[:, chosen, None]
        return total.to(outputs.dtype)
