"""Mixture of experts: a router chooses experts for each token; a shared expert, where there is one, sees every token.

T tokens, H hidden size.
"""

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.layers.experts import Experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.router import Router
from engine.parallel.mesh import Mesh
from engine.parallel.token_dispatch import ReplicatedDispatch, TokenDispatch


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
        self._tp = mesh.tp
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self._scales_inputs = scales_inputs
        self._dispatch: TokenDispatch = ReplicatedDispatch(
            experts.first_expert, experts.num_experts, scales_inputs=scales_inputs
        )

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, H] to [T, H], the same on all ranks; one reduction for routed and shared experts together.

        ``adapters``: of the T tokens.
        """
        output = self._routed(hidden, adapters)
        if self.shared_expert is not None:
            output = output + self.shared_expert.forward_partial(hidden, adapters)
        return self._tp.all_reduce(output)

    def _routed(self, hidden: torch.Tensor, adapters: StepAdapters | None) -> torch.Tensor:
        """This rank's experts' summand."""
        expert_ids, scores = self.router.forward(hidden)
        if adapters is None:
            output = self.experts.forward_routed(hidden, expert_ids, scores, scales_inputs=self._scales_inputs)
            if output is not None:
                return output
        tokens, counts, handle = self._dispatch.dispatch(hidden, expert_ids, scores)
        pair_adapters = None if adapters is None else adapters.select(handle.token_rows)
        return self._dispatch.combine(self.experts.forward(tokens, counts, pair_adapters), handle)
