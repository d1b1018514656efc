"""Routers: which experts see a token, and how much each counts. T tokens, E experts, K experts per token, H hidden
size."""

import abc

import torch
from torch import nn
from torch.nn import functional

from engine.kernels import routing
from engine.kernels.fixed_linear import fixed_linear
from engine.kernels.routing import Scoring
from engine.layer_config import MoeConfig
from engine.parameter import ParameterBuilder

_STEP = 32
"""Numbers of two vectors of float32, which torch's kernels take together."""


class Router(nn.Module, abc.ABC):
    """A matrix [E, H] that every rank holds in full, ``name`` in the checkpoint."""

    def __init__(self, build: ParameterBuilder, name: str, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self._config = config
        self._is_deterministic = build.mesh.config.is_deterministic
        self.num_experts, self.num_chosen = config.num_experts, config.num_experts_per_token
        self.weight = build.whole(f"{name}.weight", config.num_experts, hidden_size)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] to expert ids [T, K] int64 and scores [T, K] float32."""
        routed = routing.route(hidden, self.weight, self._config.num_experts_per_token, self.scoring)
        if routed is not None:
            return routed
        # A matrix of so few rows is slow in bfloat16 on CPUs; the logits are rounded as if it had been used.
        product = fixed_linear if self._is_deterministic else functional.linear
        logits = product(hidden.to(torch.float32), self.weight.to(torch.float32))
        return self.choose(logits.to(hidden.dtype))

    @property
    @abc.abstractmethod
    def scoring(self) -> Scoring:
        """What ``choose`` does, by name."""

    @abc.abstractmethod
    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``forward``, from logits [T, E]."""


class SigmoidRouter(Router):
    """Llama 4's: the K largest logits, each through a sigmoid, not renormalised."""

    scoring = Scoring.SIGMOID

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest, expert_ids = logits.topk(self._config.num_experts_per_token, dim=-1)
        # What is left over of whole vectors is computed otherwise, and which numbers that are depends on the others.
        num_chosen = largest.shape[-1]
        whole = functional.pad(largest.float(), (0, -num_chosen % _STEP))
        return expert_ids, whole.sigmoid()[:, :num_chosen]


class SoftmaxRouter(Router):
    """Mixtral's and Qwen3's: softmax over all experts, the K largest, which may be divided by their sum."""

    @property
    def scoring(self) -> Scoring:
        return Scoring.NORMALIZED_SOFTMAX if self._config.normalize_scores else Scoring.SOFTMAX

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, expert_ids = logits.float().softmax(dim=-1).topk(self._config.num_experts_per_token, dim=-1)
        if self._config.normalize_scores:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return expert_ids, scores
