"""The expert-dispatch seam: brings tokens to the experts that they were routed to, and the results back.

T tokens, K experts per token, N (token, expert) pairs of this rank, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kernels import routing


@dataclass(frozen=True)
class DispatchHandle:
    """What ``combine`` needs of ``dispatch``: for each of the N pairs the row of its token, and T.

    ``scores`` [N]: factors on the experts' outputs; None where the inputs were scaled.
    """

    token_rows: torch.Tensor
    num_tokens: int
    scores: torch.Tensor | None


class TokenDispatch(Protocol):
    """Moves tokens to experts and back."""

    def dispatch(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchHandle]:
        """Args: hidden [T, H]; expert_ids [T, K] int64, global; scores [T, K] in any float format.

        Returns the inputs [N, H] of this rank's experts, in hidden's format, sorted by expert; how many each local
        expert gets, int64 on hidden's device; and the handle.
        """
        ...

    def combine(self, outputs: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum the experts' outputs [N, H] by token, in the order of the experts: [T, H]. May be partial: the caller
        reduces over the axis."""
        ...


class ReplicatedDispatch:
    """All ranks hold all tokens (attention is tensor-parallel), so each picks those of its own experts; nothing is
    sent, and the sum over ranks is the caller's all-reduce.

    Args:
        first_expert, num_experts: this rank's experts.
        scales_inputs: whether a score multiplies an expert's input; its output otherwise.
    """

    def __init__(self, first_expert: int, num_experts: int, *, scales_inputs: bool) -> None:
        self._first = first_expert
        self._num = num_experts
        self._scales_inputs = scales_inputs

    def dispatch(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchHandle]:
        num_tokens, scales_inputs = hidden.shape[0], self._scales_inputs
        mine = range(self._first, self._first + self._num)
        dispatched = routing.dispatch(hidden, expert_ids, scores, mine, scales_inputs=scales_inputs)
        if dispatched is not None:
            tokens, counts, rows, pair_scores = dispatched
            return tokens, counts, DispatchHandle(rows, num_tokens, None if scales_inputs else pair_scores)
        local = expert_ids.flatten() - self._first
        pairs = torch.nonzero((local >= 0) & (local < self._num)).squeeze(1)
        local = local[pairs]
        pairs = pairs[torch.argsort(local, stable=True)]
        counts = torch.bincount(local, minlength=self._num)
        rows = pairs // expert_ids.shape[1]
        tokens, pair_scores = hidden[rows], scores.flatten()[pairs]
        if scales_inputs:
            return _scale(tokens, pair_scores), counts, DispatchHandle(rows, num_tokens, None)
        return tokens, counts, DispatchHandle(rows, num_tokens, pair_scores)

    def combine(self, outputs: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        combined = routing.combine(outputs, handle.token_rows, handle.num_tokens, handle.scores)
        if combined is not None:
            return combined
        if handle.scores is not None:
            outputs = _scale(outputs, handle.scores)
        combined = outputs.new_zeros(handle.num_tokens, outputs.shape[1])
        return combined.index_add_(0, handle.token_rows, outputs)


def _scale(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return (rows * scores[:, None]).to(rows.dtype)
