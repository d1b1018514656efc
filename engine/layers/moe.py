"""Mixture of experts: a router chooses experts for each token; a shared expert sees every token.

T tokens, K experts per token, H hidden size.
"""

import torch
from torch import nn
from torch.nn import functional

from engine.layers.experts import ExpertNames, make_experts
from engine.layers.feed_forward import GatedFeedForward
from engine.model_config import MoeConfig
from engine.parallel.token_dispatch import ReplicatedDispatch, TokenDispatch
from engine.parameter import ParameterBuilder


class SigmoidRouter(nn.Module):
    """Llama 4's routing: the K largest logits, each through a sigmoid in float32, not renormalised."""

    def __init__(self, build: ParameterBuilder, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self._num_experts_per_token = config.num_experts_per_token
        self.weight = build.whole("router.weight", config.num_experts, hidden_size)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] to expert ids [T, K] int64 and scores [T, K] in hidden's dtype."""
        logits, expert_ids = functional.linear(hidden, self.weight).topk(self._num_experts_per_token, dim=-1)
        return expert_ids, logits.float().sigmoid().to(hidden.dtype)


_NAMES = ExpertNames(is_fused=True)


class MixtureOfExperts(nn.Module):
    """Llama 4's mixture: the router's score multiplies an expert's *input*; the shared expert is added."""

    def __init__(self, build: ParameterBuilder, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self._tp = build.mesh.tp
        self.router = SigmoidRouter(build, hidden_size, config)
        self.experts = make_experts(build.at("experts"), hidden_size, config, _NAMES)
        self.shared_expert = GatedFeedForward(build.at("shared_expert"), hidden_size, config.intermediate_size)
        self._dispatch: TokenDispatch = ReplicatedDispatch(self.experts.first_expert, self.experts.num_experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H], the same on all ranks; one reduction for routed and shared experts together."""
        expert_ids, scores = self.router.forward(hidden)
        tokens, counts, handle = self._dispatch.dispatch(hidden, expert_ids, scores)
        routed = self._dispatch.combine(self.experts.forward(tokens, counts), handle)
        return self._tp.all_reduce(routed + self.shared_expert.forward_partial(hidden))
