"""The expert-dispatch seam: brings tokens to the experts that they were routed to, and the results back.

T tokens, K experts per token, N (token, expert) pairs of this rank, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import StepAdapters
from engine.kernels import routing


@dataclass(frozen=True)
class ExpertTokens:
    """What this rank's experts get. ``tokens`` [N, H], sorted by local expert; ``counts``: how many each local expert
    gets, int64 on the tokens' device; ``adapters``: of the N rows."""

    tokens: torch.Tensor
    counts: torch.Tensor
    adapters: StepAdapters | None


class Dispatched(Protocol):
    """Tokens on their way to experts and back; each method is called once, in this order."""

    def receive(self) -> ExpertTokens:
        """Waits for the tokens. What the caller computes before it, it computes while they are under way."""
        ...

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        """Sum the experts' outputs [N, H], in the order received, by token, in the order of the experts: [T, H], of the
        T tokens that were dispatched. May be partial: the caller reduces over the tensor-parallel ranks."""
        ...


class TokenDispatch(Protocol):
    """Moves tokens to experts and back."""

    def share(self, num_tokens: int) -> slice:
        """Which of its dp group's tokens this rank routes and dispatches."""
        ...

    def dispatch(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
        adapters: StepAdapters | None = None,
    ) -> Dispatched:
        """Args: hidden [T, H], this rank's share; expert_ids [T, K] int64, global; scores [T, K] float32; adapters of
        the T tokens."""
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

    def share(self, num_tokens: int) -> slice:
        return slice(0, num_tokens)

    def dispatch(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
        adapters: StepAdapters | None = None,
    ) -> "ReplicatedTokens":
        tokens, counts, rows, pair_scores = self._sorted(hidden, expert_ids, scores)
        arrived = ExpertTokens(tokens, counts, None if adapters is None else adapters.select(rows))
        return ReplicatedTokens(arrived, rows, len(hidden), None if self._scales_inputs else pair_scores)

    def local_pairs(self, expert_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which pairs, of T × K, are this rank's: [N], sorted by expert and then by token; and each expert's count."""
        local = expert_ids.flatten() - self._first
        pairs = torch.nonzero((local >= 0) & (local < self._num)).squeeze(1)
        local = local[pairs]
        return pairs[torch.argsort(local, stable=True)], torch.bincount(local, minlength=self._num)

    def _sorted(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, counts, and of the N pairs the tokens' rows and the scores."""
        mine = range(self._first, self._first + self._num)
        dispatched = routing.dispatch(hidden, expert_ids, scores, mine, scales_inputs=self._scales_inputs)
        if dispatched is not None:
            return dispatched
        pairs, counts = self.local_pairs(expert_ids)
        rows = pairs // expert_ids.shape[1]
        tokens, pair_scores = hidden[rows], scores.flatten()[pairs]
        return scaled(tokens, pair_scores) if self._scales_inputs else tokens, counts, rows, pair_scores


@dataclass(frozen=True)
class ReplicatedTokens:
    """See Dispatched. For each of the N pairs the row of its token; ``scores`` [N]: factors on the outputs; None where
    the inputs were scaled."""

    arrived: ExpertTokens
    token_rows: torch.Tensor
    num_tokens: int
    scores: torch.Tensor | None

    def receive(self) -> ExpertTokens:
        return self.arrived

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        combined = routing.combine(outputs, self.token_rows, self.num_tokens, self.scores)
        if combined is not None:
            return combined
        if self.scores is not None:
            outputs = scaled(outputs, self.scores)
        combined = outputs.new_zeros(self.num_tokens, outputs.shape[1])
        return combined.index_add_(0, self.token_rows, outputs)


def scaled(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """[N, H] by [N]: multiplied as exactly as the more exact of the two, rounded to the rows' format."""
    return (rows * scores[:, None]).to(rows.dtype)
