"""Unquantized matrices, in the activations' format."""

from collections.abc import Sequence

import torch

from engine.kernels.fixed_linear import fixed_linear
from engine.kernels.linear import linear
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart, WeightMatrix


class DenseMatrix(WeightMatrix):
    """One tensor [out, in]."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart]) -> None:
        super().__init__(build, parts)
        self._product = fixed_linear if build.mesh.config.is_deterministic else linear
        self.weight = build.empty(self.num_outputs, self.num_inputs)
        for part, weight in zip(parts, self.weight.split([part.local_outputs for part in parts]), strict=True):
            build.fill(weight, f"{part.name}.weight", (part.num_outputs, part.num_inputs), part.start)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self.weight[index]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._product(hidden, self.weight)
