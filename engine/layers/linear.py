"""Linear layers whose matrices are divided over the tensor-parallel ranks ("Megatron-LM", arXiv 1909.08053).

T tokens. Weights are [out, in], as in the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from engine.layers.parameter import ParameterBuilder, Split


@dataclass(frozen=True)
class ColumnPart:
    """One checkpoint matrix [size, in] of a fused column-parallel layer, and how its rows are divided."""

    name: str
    size: int
    split: Split

    @property
    def local_size(self) -> int:
        return self.split.size(self.size)


class ColumnParallelLinear(nn.Module):
    """Several matrices with the same input as one; each rank computes its part of every one's outputs."""

    def __init__(self, build: ParameterBuilder, num_inputs: int, parts: Sequence[ColumnPart], bias: bool) -> None:
        super().__init__()
        self.local_sizes = [part.local_size for part in parts]
        self.weight = build.empty(sum(self.local_sizes), num_inputs)
        self.bias = build.empty(sum(self.local_sizes)) if bias else None
        weights = self.weight.split(self.local_sizes)
        biases = self.bias.split(self.local_sizes) if self.bias is not None else [None] * len(parts)
        for part, weight, part_bias in zip(parts, weights, biases, strict=True):
            start = part.split.start(part.size)
            build.fill(weight, f"{part.name}.weight", (part.size, num_inputs), (start, 0))
            if part_bias is not None:
                build.fill(part_bias, f"{part.name}.bias", (part.size,), (start,))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, sum of local sizes]."""
        return functional.linear(hidden, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Takes inputs that are divided over the ranks. The result is a partial sum until it is reduced."""

    def __init__(self, build: ParameterBuilder, name: str, num_inputs: int, num_outputs: int, bias: bool) -> None:
        super().__init__()
        self._tp = build.mesh.tp
        self.weight = build.empty(num_outputs, build.tp.size(num_inputs))
        build.fill(self.weight, f"{name}.weight", (num_outputs, num_inputs), (0, build.tp.start(num_inputs)))
        self.bias = build.whole(f"{name}.bias", num_outputs) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, local in] to the full [T, out], the same on all ranks."""
        output = self._tp.all_reduce(self.forward_partial(hidden))
        return output if self.bias is None else output + self.bias

    def forward_partial(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, local in] to this rank's summand of [T, out], without the bias."""
        return functional.linear(hidden, self.weight)
