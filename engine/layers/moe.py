"""Mixture of experts: a router chooses experts for each token; a shared expert, where there is one, sees every token.

T tokens, H hidden size.
"""

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.config import Determinism
from engine.kernels.mixture import NativeMixture
from engine.layers.experts import Experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.native_mixture import native_mixture
from engine.layers.router import Router
from engine.parallel.all_to_all_dispatch import AllToAllDispatch
from engine.parallel.expert_balance import linear_placement
from engine.parallel.expert_table import ExpertTable
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
        self._is_deterministic = mesh.config.is_deterministic
        self._is_in_order = mesh.config.determinism is Determinism.D2
        self._is_replicated = not mesh.config.exchanges_tokens
        self.table = self._make_table(mesh)
        self._dispatch = self._make_dispatch(mesh)
        self._counts_loads = mesh.config.ep > 1
        self.loads = torch.zeros(experts.num_slots, dtype=torch.int64)
        """[slots]: (token, expert) pairs that each of this rank's slots has had, where there is more than one ep rank.
        On the device of the experts."""

    def _make_table(self, mesh: Mesh) -> ExpertTable:
        """Ranks that exchange tokens route different ones."""
        parallel, num_experts = mesh.config, self.router.num_experts
        placement = linear_placement(num_experts, parallel.ep, self.experts.num_slots)
        offset = 0 if self._is_replicated else mesh.expert_index
        return ExpertTable(num_experts, placement, offset=offset, is_fixed=not parallel.balances_experts)

    def _make_dispatch(self, mesh: Mesh) -> TokenDispatch:
        experts, scales_inputs = self.experts, self._scales_inputs
        if self._is_replicated:
            return ReplicatedDispatch(experts.first_slot, experts.num_slots, scales_inputs=scales_inputs)
        return AllToAllDispatch(mesh, self.table, scales_inputs=scales_inputs)

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, H] to [T, H], the same on all tensor-parallel ranks; one reduction for routed and shared experts
        together. Where tokens are exchanged T may be 0: this rank's experts then work for others.

        ``adapters``: of the T tokens.
        """
        if self._is_in_order or (self._is_deterministic and self._is_replicated and hidden.is_cuda):
            return self._forward_in_order(hidden)
        share = self._dispatch.share(len(hidden))
        routed, shared = self._routed(hidden[share], adapters, share, hidden)
        if len(hidden) == 0:
            return hidden  # no other rank of the dp group has anything to add up either
        if shared is None and self._is_replicated:
            return sum_over_ranks(routed, self._mesh, hidden.dtype)
        if shared is not None and self._is_deterministic and not self._is_replicated:
            # Which rank has a token's share depends on the batch: it is not to be added to that rank's summand.
            both = torch.cat((shared, torch.zeros_like(hidden)), dim=1)
            both[share, hidden.shape[1] :] = routed
            whole, routed = sum_over_ranks(both, self._mesh, hidden.dtype).chunk(2, dim=1)
            return whole + routed
        output = torch.zeros_like(hidden) if shared is None else shared
        output[share] += routed
        return sum_over_ranks(output, self._mesh, hidden.dtype)

    def _forward_in_order(self, hidden: torch.Tensor) -> torch.Tensor:
        """Under D2, and on GPUs, whose sums by token are in no order: each expert's output is put together from all
        ranks and rounded, as if it were computed at one place, and then they are added up in the order of their
        numbers."""
        assert isinstance(self._dispatch, ReplicatedDispatch)
        expert_ids, scores = self.router.forward(hidden)
        expert_ids, by_number = expert_ids.sort(dim=1)
        scores = scores.gather(1, by_number)
        num_tokens, num_chosen = expert_ids.shape
        pairs, counts = self._dispatch.local_pairs(self.table.slots(expert_ids))
        self._count(counts)
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

    def native(self) -> tuple[NativeMixture, tuple[object, ...]] | None:
        """The same, but for the reduction, as one native call, and what that has addresses of; where there is such.
        To be made when the weights are in place."""
        if not self._is_replicated or self._is_in_order:
            return None
        loads = self.loads if self._counts_loads else None
        parts = self.router, self.experts, self.table, self.shared_expert
        return native_mixture(*parts, loads, scales_inputs=self._scales_inputs)

    def _routed(
        self, mine: torch.Tensor, adapters: StepAdapters | None, share: slice, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The routed experts' sum, of the rank's share of tokens, and the shared expert's summand, of all."""
        expert_ids, scores = self.router.forward(mine)
        if self._is_replicated:
            expert_ids = self.table.slots(expert_ids)
        if adapters is None and self._is_replicated:
            output = self.experts.forward_routed(mine, expert_ids, scores, scales_inputs=self._scales_inputs)
            if output is not None:
                self._count_slots(expert_ids)
                return output, self._shared(hidden, adapters)
        own = adapters if adapters is None or self._is_replicated else adapters.part(share)
        dispatched = self._dispatch.dispatch(mine, expert_ids, scores, own)
        shared = self._shared(hidden, adapters)  # while tokens are under way
        return dispatched.combine(self._computed(dispatched.receive())), shared

    def _computed(self, arrived: ExpertTokens) -> torch.Tensor:
        self._count(arrived.counts)
        return self.experts.forward(arrived.tokens, arrived.counts, arrived.adapters)

    def _shared(self, hidden: torch.Tensor, adapters: StepAdapters | None) -> torch.Tensor | None:
        if self.shared_expert is None or not len(hidden):
            return None
        return self.shared_expert.forward_partial(hidden, adapters)

    def _count(self, counts: torch.Tensor) -> None:
        """[slots]"""
        if self._counts_loads:
            self._loads_on(counts.device).add_(counts)

    def _count_slots(self, slots: torch.Tensor) -> None:
        """[T, K], where nothing else counted them. The host is asked for nothing, so that a graph can hold it."""
        if self._counts_loads:
            local = slots.flatten() - self.experts.first_slot
            is_mine = (local >= 0) & (local < self.experts.num_slots)
            self._loads_on(slots.device).scatter_add_(0, local.where(is_mine, 0), is_mine.to(torch.int64))

    def _loads_on(self, device: torch.device) -> torch.Tensor:
        """Moves the counters once: a plan makes its model on no device at all."""
        if self.loads.device != device:
            self.loads = self.loads.to(device)
        return self.loads
