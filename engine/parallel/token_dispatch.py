"""The expert-dispatch seam: brings tokens to the experts that they were routed to, and the results back.

T tokens, K experts per token, N (token, expert) pairs of this rank, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class DispatchHandle:
    """What ``combine`` needs of ``dispatch``: for each of the N pairs the row of its token, and T."""

    token_rows: torch.Tensor
    num_tokens: int


class TokenDispatch(Protocol):
    """Moves tokens to experts and back."""

    def dispatch(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, list[int], DispatchHandle]:
        """Args: hidden [T, H]; expert_ids [T, K] int64, global; scores [T, K] in hidden's dtype.

        Returns the inputs [N, H] of this rank's experts, already multiplied by their scores, sorted by expert; how many
        each local expert gets; and the handle.
        """
        ...

    def combine(self, outputs: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum the experts' outputs [N, H] by token: [T, H]. May be partial: the caller reduces over the axis."""
        ...


class ReplicatedDispatch:
    """All ranks hold all tokens (attention is tensor-parallel), so each picks those of its own experts; nothing is
    sent, and the sum over ranks is the caller's all-reduce.

    Args:
        first_expert, num_experts: this rank's experts.
    """

    def __init__(self, first_expert: int, num_experts: int) -> None:
        self._first = first_expert
        self._num = num_experts

    def dispatch(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, list[int], DispatchHandle]:
        local = expert_ids.flatten() - self._first
        pairs = torch.nonzero((local >= 0) & (local < self._num)).squeeze(1)
        local = local[pairs]
        pairs = pairs[torch.argsort(local, stable=True)]
        counts: list[int] = torch.bincount(local, minlength=self._num).tolist()
        rows = pairs // expert_ids.shape[1]
        tokens = hidden[rows] * scores.flatten()[pairs, None]
        return tokens, counts, DispatchHandle(rows, hidden.shape[0])

    def combine(self, outputs: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        combined = outputs.new_zeros(handle.num_tokens, outputs.shape[1])
        return combined.index_add_(0, handle.token_rows, outputs)
