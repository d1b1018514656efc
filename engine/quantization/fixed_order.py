"""Matrices in deterministic mode (docs/determinism.md): one algorithm for every number of tokens, in every format."""

from collections.abc import Sequence

import torch
from torch import nn

from engine.kernels.fixed_linear import fixed_linear
from engine.parallel.ordered_sum import tree_sum
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart, WeightMatrix, multiply_by_tiles


class FixedOrderMatrix(WeightMatrix):
    """A quantized matrix, whose weights are brought into the activations' format and multiplied by ``fixed_linear``."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], inner: WeightMatrix) -> None:
        super().__init__(build, parts)
        self.inner = inner

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self.inner.rows(index)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return multiply_by_tiles(hidden, self.num_outputs, self.inner.rows, fixed_linear)


class ShardedMatrix(WeightMatrix):
    """A matrix whose inputs are divided, in the canonical shards that belong to this rank."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], shards: Sequence[WeightMatrix]) -> None:
        super().__init__(build, parts)
        self.shards = nn.ModuleList(shards)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return torch.cat([shard.rows(index) for shard in self._each()], dim=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out] float32: each shard's summand is rounded, their sum is not."""
        parts = hidden.chunk(len(self.shards), dim=-1)
        return tree_sum(shard.forward(part) for shard, part in zip(self._each(), parts, strict=True))

    def _each(self) -> list[WeightMatrix]:
        return [shard for shard in self.shards if isinstance(shard, WeightMatrix)]
