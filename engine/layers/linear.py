"""Linear layers whose matrices are divided over the tensor-parallel ranks ("Megatron-LM", arXiv 1909.08053).

T tokens. Weights are [out, in], as in the checkpoint; how they are held is engine.quantization's affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.batch import StepAdapters
from engine.layers.lora import LoraLayer
from engine.parallel.ordered_sum import sum_over_ranks
from engine.parameter import ParameterBuilder, Split
from engine.quantization.matrix import MatrixPart
from engine.quantization.registry import make_input_divided, make_matrix


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
        matrix_parts = [MatrixPart(p.name, p.size, num_inputs, outputs=p.split) for p in parts]
        self.matrix = make_matrix(build, matrix_parts)
        self.lora = LoraLayer(build, matrix_parts)
        self.bias = build.empty(sum(self.local_sizes)) if bias else None
        if self.bias is not None:
            for part, values in zip(parts, self.bias.split(self.local_sizes), strict=True):
                build.fill(values, f"{part.name}.bias", (part.size,), (part.split.start(part.size),))

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, in] to [T, sum of local sizes]. ``adapters``: of the T tokens."""
        output = self.lora.add_to(self.matrix.forward(hidden), hidden, adapters)
        return output if self.bias is None else output + self.bias


class RowParallelLinear(nn.Module):
    """Takes inputs that are divided over the ranks. The result is a partial sum until it is reduced."""

    def __init__(self, build: ParameterBuilder, name: str, num_inputs: int, num_outputs: int, bias: bool) -> None:
        super().__init__()
        self._mesh = build.mesh
        part = MatrixPart(name, num_outputs, num_inputs, inputs=build.tp)
        self.matrix = make_input_divided(build, part)
        self.lora = LoraLayer(build, [part])
        self.bias = build.whole(f"{name}.bias", num_outputs) if bias else None

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, local in] to the full [T, out], the same on all ranks."""
        output = sum_over_ranks(self.forward_partial(hidden, adapters), self._mesh, hidden.dtype)
        return output if self.bias is None else output + self.bias

    def forward_partial(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, local in] to this rank's summand of [T, out], without the bias, for ``sum_over_ranks``."""
        return self.lora.add_to(self.matrix.forward(hidden), hidden, adapters)
