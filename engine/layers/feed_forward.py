"""The dense gated feed-forward layer, also the shared expert of a mixture."""

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.layers.activation import silu_and_multiply
from engine.layers.linear import ColumnParallelLinear, ColumnPart, RowParallelLinear
from engine.parameter import ParameterBuilder


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), ``intermediate_size`` divided over the tensor-parallel ranks. T tokens."""

    def __init__(self, build: ParameterBuilder, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        parts = [ColumnPart(name, intermediate_size, build.tp) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnParallelLinear(build, hidden_size, parts, bias)
        self.down = RowParallelLinear(build, "down_proj", intermediate_size, hidden_size, bias)

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size], the same on all ranks."""
        return self.down.forward(silu_and_multiply(self.gate_up.forward(hidden, adapters)), adapters)

    def forward_partial(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """This rank's summand of ``forward``, for a caller that reduces it together with others. No bias."""
        return self.down.forward_partial(silu_and_multiply(self.gate_up.forward(hidden, adapters)), adapters)
