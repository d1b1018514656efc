"""Tokens to the ranks of their experts and back, where attention is data-parallel: each dp group has tokens of its own.

A token travels once to each rank that has any of its experts, with the slots of these and their scores, and one sum of
their outputs comes back. All expert_tp ranks that together hold one copy of an expert get it, and return summands.
Within a dp group, whose ranks hold the same tokens, each sends a share of them.

Where the order of sums matters (``--deterministic``) the outputs of a token's experts come back one by one instead:
which of them share a rank depends on the layout.

T tokens of this rank, K experts per token, U rows sent, N (token, expert) pairs received, H hidden size.
"""

from dataclasses import dataclass

import torch

from engine.batch import StepAdapters
from engine.kernels import routing
from engine.messages import NO_ADAPTER
from engine.parallel.collectives import ReceivedRows
from engine.parallel.expert_table import ExpertTable
from engine.parallel.mesh import Mesh
from engine.parallel.token_dispatch import ExpertTokens, scaled

_LABEL = torch.int32
_NO_SLOT = -1


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
        self._sums_where_computed = not mesh.config.is_deterministic
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
        num_parts = self._expert_tp
        expert_ids, by_expert = expert_ids.sort(dim=1)
        scores = scores.gather(1, by_expert)
        place = self._table.slots(expert_ids)  # [T, K]
        holder = place // self._num_slots
        goes = torch.zeros(len(hidden), self._stage.size // num_parts, dtype=torch.bool, device=hidden.device)
        by_receiver = goes.scatter_(1, holder, True).t().repeat_interleave(num_parts, dim=0)  # [ranks, T]
        receivers, token_rows = by_receiver.nonzero(as_tuple=True)
        is_there = holder[token_rows] == (receivers // num_parts)[:, None]  # [U, K]
        slots = torch.where(is_there, place[token_rows] % self._num_slots, _NO_SLOT)
        adapter = torch.full_like(token_rows, NO_ADAPTER) if adapters is None else adapters.slots[token_rows]
        labels = torch.cat([slots, adapter[:, None]], dim=1).to(_LABEL)
        parts = (hidden[token_rows], labels, scores[token_rows])
        rows = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
        counts = by_receiver.sum(1).cpu()
        sent = _Sent(token_rows, counts, scores, None)
        if not self._sums_where_computed:
            row, chosen = is_there.nonzero(as_tuple=True)
            order = (token_rows[row] * scores.shape[1] + chosen) * num_parts + receivers[row] % num_parts
            pair_counts = torch.bincount(receivers[row], minlength=self._stage.size).cpu()
            sent = _Sent(token_rows, counts, scores, _SentPairs(order, pair_counts, num_parts))
        return ExchangedTokens(self, sent, hidden.dtype, self._stage.post_rows(rows, counts))

    def receive(self, rows: torch.Tensor, num_chosen: int, dtype: torch.dtype) -> "_Arrived":
        """From rows as ``dispatch`` has made them, in the order of their arrival."""
        numbers = rows[:, -(2 * num_chosen + 1) * _LABEL.itemsize :].clone()
        labels = numbers.view(_LABEL)[:, : num_chosen + 1].long()
        pair_rows, chosen = (labels[:, :num_chosen] != _NO_SLOT).nonzero(as_tuple=True)
        slots = labels[pair_rows, chosen]
        order = torch.argsort(slots, stable=True)
        sorted_rows = pair_rows[order]
        tokens = rows[sorted_rows, : -numbers.shape[1]].view(dtype)
        scores = numbers.view(torch.float32)[sorted_rows, num_chosen + 1 + chosen[order]]
        if self._scales_inputs:
            tokens = scaled(tokens, scores)
        adapters = None
        if (labels[:, num_chosen] != NO_ADAPTER).any():
            adapters = StepAdapters.of(labels[sorted_rows, num_chosen].tolist(), rows.device)
        counts = torch.bincount(slots, minlength=self._num_slots)
        return _Arrived(ExpertTokens(tokens, counts, adapters), len(rows), pair_rows, order, scores)

    def sum_and_return(
        self, outputs: torch.Tensor, arrived: "_Arrived", received: torch.Tensor, sent: "_Sent"
    ) -> torch.Tensor:
        """Outputs [N, H], as the experts got their inputs, to the sums [T, H] of the tokens that ``sent`` has sent.
        Added up in float32 and rounded where they were computed, and again here."""
        rows = arrived.pair_rows[arrived.order]
        sums = _sum_by_row(outputs, rows, arrived.num_rows, None if self._scales_inputs else arrived.scores)
        returned, _ = self._stage.post_rows(sums, received, sent.counts)()
        return _sum_by_row(returned, sent.token_rows, len(sent.scores), None)

    def return_and_sum(
        self, outputs: torch.Tensor, arrived: "_Arrived", received: torch.Tensor, sent: "_Sent", pairs: "_SentPairs"
    ) -> torch.Tensor:
        """The same, always in the same order, in float32 and rounded once: the result depends neither on which ranks
        compute nor on what else is computed."""
        by_arrival = torch.empty_like(outputs)
        by_arrival[arrived.order] = outputs
        ends = torch.bincount(arrived.pair_rows, minlength=arrived.num_rows).cumsum(0).cpu()
        ends = torch.cat([ends.new_zeros(1), ends])[torch.cat([received.new_zeros(1), received.cumsum(0)])]
        returned, _ = self._stage.post_rows(by_arrival, ends.diff(), pairs.counts)()
        num_tokens, num_chosen = sent.scores.shape
        summands = torch.empty_like(returned)
        summands[pairs.order] = returned
        summands = summands.view(num_tokens, num_chosen, pairs.num_parts, outputs.shape[1])
        total = torch.zeros(num_tokens, outputs.shape[1], dtype=_accumulator(outputs), device=outputs.device)
        for chosen in range(num_chosen):
            whole = summands[:, chosen, 0].to(total.dtype)
            for part in range(1, pairs.num_parts):
                whole = whole + summands[:, chosen, part]
            total += whole if self._scales_inputs else whole * sent.scores[:, chosen, None]
        return total.to(outputs.dtype)

    def combine(
        self, outputs: torch.Tensor, arrived: "_Arrived", received: torch.Tensor, sent: "_Sent"
    ) -> torch.Tensor:
        if sent.pairs is None:
            return self.sum_and_return(outputs, arrived, received, sent)
        return self.return_and_sum(outputs, arrived, received, sent, sent.pairs)


@dataclass(frozen=True)
class _SentPairs:
    """``order`` [U's pairs]: of what comes back, its place among (token, its experts in ascending order, part), of
    which there are ``num_parts``; ``counts``: by rank."""

    order: torch.Tensor
    counts: torch.Tensor
    num_parts: int


@dataclass(frozen=True)
class _Sent:
    """``token_rows`` [U]: which token each row was; ``counts``: rows by receiver, [ranks] on the CPU; ``scores``
    [T, K]: in ascending order of experts. ``pairs``: where outputs come back one by one."""

    token_rows: torch.Tensor
    counts: torch.Tensor
    scores: torch.Tensor
    pairs: _SentPairs | None


@dataclass(frozen=True)
class _Arrived:
    """``pair_rows`` [N]: the row of each pair, in the order of arrival; ``order`` [N]: which of these pairs each of the
    experts' inputs is; ``scores`` [N]: as the inputs."""

    tokens: ExpertTokens
    num_rows: int
    pair_rows: torch.Tensor
    order: torch.Tensor
    scores: torch.Tensor


class ExchangedTokens:
    """See Dispatched."""

    def __init__(self, dispatch: AllToAllDispatch, sent: _Sent, dtype: torch.dtype, rows: ReceivedRows) -> None:
        self._dispatch, self._sent, self._dtype = dispatch, sent, dtype
        self._rows: ReceivedRows | None = rows
        self._arrived: _Arrived | None = None
        self._received = torch.empty(0, dtype=torch.int64)

    def receive(self) -> ExpertTokens:
        assert self._rows is not None, "received once"
        rows, self._received = self._rows()
        self._rows = None  # it holds what was sent
        self._arrived = self._dispatch.receive(rows, self._sent.scores.shape[1], self._dtype)
        return self._arrived.tokens

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        assert self._arrived is not None, "received before"
        return self._dispatch.combine(outputs, self._arrived, self._received, self._sent)


def _sum_by_row(summands: torch.Tensor, rows: torch.Tensor, num_rows: int, scores: torch.Tensor | None) -> torch.Tensor:
    """[N, H] to [num_rows, H] by their rows [N], each multiplied by its score: in float32, rounded once."""
    combined = routing.combine(summands, rows, num_rows, scores)
    if combined is not None:
        return combined
    wide = summands.to(_accumulator(summands)) if scores is None else summands * scores[:, None]
    total = wide.new_zeros(num_rows, wide.shape[1])
    return total.index_add_(0, rows, wide).to(summands.dtype)


def _accumulator(summands: torch.Tensor) -> torch.dtype:
    return torch.promote_types(summands.dtype, torch.float32)
