"""Mixture of experts: a router chooses experts for each token; a shared expert sees every token.

T tokens, K experts per token, E experts, H hidden size, I expert width. Experts are divided over ep ranks, each
expert's width over the expert_tp ranks that remain.
"""

import torch
from torch import nn
from torch.nn import functional

from engine.layers.activation import silu_and_multiply
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.parameter import ParameterBuilder, Split
from engine.model_config import MoeConfig
from engine.parallel.token_dispatch import ReplicatedDispatch, TokenDispatch


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


class Experts(nn.Module):
    """This rank's experts, stored as Llama 4's checkpoints do: [E, H, 2 × I], gate first, and [E, I, H]."""

    def __init__(self, build: ParameterBuilder, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        mesh, width = build.mesh, config.intermediate_size
        by_expert = Split(mesh.config.ep, mesh.ep_rank)
        by_width = Split(mesh.config.expert_tp, mesh.expert_tp_rank)
        self.num_experts = by_expert.size(config.num_experts)
        self.first_expert = by_expert.start(config.num_experts)
        local_width, start = by_width.size(width), by_width.start(width)
        self.gate_up = build.empty(self.num_experts, hidden_size, 2 * local_width)
        self.down = build.empty(self.num_experts, local_width, hidden_size)
        shape = (config.num_experts, hidden_size, 2 * width)
        gate, up = self.gate_up.chunk(2, dim=-1)
        build.fill(gate, "gate_up_proj", shape, (self.first_expert, 0, start))
        build.fill(up, "gate_up_proj", shape, (self.first_expert, 0, width + start))
        build.fill(self.down, "down_proj", (config.num_experts, width, hidden_size), (self.first_expert, start, 0))

    def forward(self, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """[N, H] sorted by local expert, with how many belong to each, to this rank's summand of [N, H]."""
        outputs = torch.empty_like(tokens)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                inner = silu_and_multiply(tokens[start : start + count] @ self.gate_up[expert])
                torch.mm(inner, self.down[expert], out=outputs[start : start + count])
            start += count
        return outputs


class MixtureOfExperts(nn.Module):
    """Llama 4's mixture: the router's score multiplies an expert's *input*; the shared expert is added."""

    def __init__(self, build: ParameterBuilder, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self._tp = build.mesh.tp
        self.router = SigmoidRouter(build, hidden_size, config)
        self.experts = Experts(build.at("experts"), hidden_size, config)
        self.shared_expert = GatedFeedForward(build.at("shared_expert"), hidden_size, config.intermediate_size)
        self._dispatch: TokenDispatch = ReplicatedDispatch(self.experts.first_expert, self.experts.num_experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H], the same on all ranks; one reduction for routed and shared experts together."""
        expert_ids, scores = self.router.forward(hidden)
        tokens, counts, handle = self._dispatch.dispatch(hidden, expert_ids, scores)
        routed = self._dispatch.combine(self.experts.forward(tokens, counts), handle)
        return self._tp.all_reduce(routed + self.shared_expert.forward_partial(hidden))
