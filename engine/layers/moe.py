"""Mixture of experts: a router chooses experts for each token; a shared expert, where there is one, sees every token.

T tokens, H hidden size.
"""

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.config import Determinism
from engine.layers.experts import Experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.router import Router
from engine.parallel.all_to_all_dispatch import AllToAllDispatch
from engine.parallel.expert_balance import linear_placement
from engine.parallel.mesh import Mesh
from engine.parallel.ordered_sum import sum_over_ranks
from engine.parallel.token_dispatch import ExpertTokens, ReplicatedDispatch, TokenDispatch, scaled


class MixtureOfExperts(nn.Module):
    """Routed experts, weighted by the router's scores, and a shared one.

    Args:
        scales_inputs: whether a score multiplies its expert's input; its output otherwise.
    """

    def __init__(
        self,
        mesh: Mesh,
        router: Router,
        experts: Experts,
        *,
        shared_expert: GatedFeedForward | None = None,
        scales_inputs: bool = False,
    ) -> None:
        super().__init__()
        self._mesh = mesh
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self._scales_inputs = scales_inputs
        self._is_in_order = mesh.config.determinism is Determinism.D2
        self._dispatch = self._make_dispatch(mesh)
        self._is_replicated = not mesh.config.exchanges_tokens

    def _make_dispatch(self, mesh: Mesh) -> TokenDispatch:
        experts, scales_inputs = self.experts, self._scales_inputs
        if not mesh.config.exchanges_tokens:
            return ReplicatedDispatch(experts.first_expert, experts.num_experts, scales_inputs=scales_inputs)
        placement = linear_placement(self.router.num_experts, mesh.config.ep, experts.num_experts)
        return AllToAllDispatch(mesh, placement, self.router.num_experts, scales_inputs=scales_inputs)

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, H] to [T, H], the same on all tensor-parallel ranks; one reduction for routed and shared experts
        together. Where tokens are exchanged T may be 0: this rank's experts then work for others.

        ``adapters``: of the T tokens.
        """
        if self._is_in_order:
            return self._forward_in_order(hidden)
        share = self._dispatch.share(len(hidden))
        routed, shared = self._routed(hidden[share], adapters, share, hidden)
        if len(hidden) == 0:
            return hidden  # no other rank of the dp group has anything to add up either
        if shared is None and self._is_replicated:
            return sum_over_ranks(routed, self._mesh, hidden.dtype)
        output = torch.zeros_like(hidden) if shared is None else shared
        output[share] += routed
        return sum_over_ranks(output, self._mesh, hidden.dtype)

    def _forward_in_order(self, hidden: torch.Tensor) -> torch.Tensor:
        """Under D2: each expert's output is put together from all ranks and rounded, as if it were computed at one
        place, and then they are added up in the order of their numbers."""
        assert isinstance(self._dispatch, ReplicatedDispatch)
        expert_ids, scores = self.router.forward(hidden)
        expert_ids, by_number = expert_ids.sort(dim=1)
        scores = scores.gather(1, by_number)
        num_tokens, num_chosen = expert_ids.shape
        pairs, counts = self._dispatch.local_pairs(expert_ids)
        rows, places = pairs // num_chosen, pairs % num_chosen
        tokens = hidden[rows]
        if self._scales_inputs:
            tokens = scaled(tokens, scores[rows, places])
        has_shared = self.shared_expert is not None
        summands = hidden.new_zeros(num_tokens, num_chosen + has_shared, hidden.shape[1], dtype=torch.float32)
        summands[rows, places] = self.experts.forward(tokens, counts)
        if self.shared_expert is not None:
            summands[:, num_chosen] = self.shared_expert.forward_partial(hidden)
        whole = sum_over_ranks(summands.flatten(1), self._mesh, hidden.dtype).view_as(summands).float()
        total = torch.zeros_like(whole[:, 0])
        for place in range(num_chosen):
            total += whole[:, place] if self._scales_inputs else whole[:, place] * scores[:, place, None]
        return (total + whole[:, num_chosen] if has_shared else total).to(hidden.dtype)

    def _routed(
        self, mine: torch.Tensor, adapters: StepAdapters | None, share: slice, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The routed experts' sum, of the rank's share of tokens, and the shared expert's summand, of all."""
        expert_ids, scores = self.router.forward(mine)
        if adapters is None and self._is_replicated:
            output = self.experts.forward_routed(mine, expert_ids, scores, scales_inputs=self._scales_inputs)
            if output is not None:
                return output, self._shared(hidden, adapters)
        own = adapters if adapters is None or self._is_replicated else adapters.part(share)
        dispatched = self._dispatch.dispatch(mine, expert_ids, scores, own)
        shared = self._shared(hidden, adapters)  # while tokens are under way
        return dispatched.combine(self._computed(dispatched.receive())), shared

    def _computed(self, arrived: ExpertTokens) -> torch.Tensor:
        return self.experts.forward(arrived.tokens, arrived.counts, arrived.adapters)

    def _shared(self, hidden: torch.Tensor, adapters: StepAdapters | None) -> torch.Tensor | None:
        if self.shared_expert is None or not len(hidden):
            return None
        return self.shared_expert.forward_partial(hidden, adapters)
