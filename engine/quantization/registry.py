"""Which class holds which format. Classes are imported only when they are built."""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from engine.config import Determinism
from engine.parameter import ParameterBuilder, Split
from engine.quantization.dense import DenseMatrix
from engine.quantization.fixed_order import FixedOrderMatrix, ShardedMatrix
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization_config import MatrixFormat, WeightFormat

MATRICES = {
    WeightFormat.FP8: "engine.quantization.fp8:Fp8Matrix",
    WeightFormat.FP8_BLOCKS: "engine.quantization.fp8_blocks:Fp8BlockMatrix",
    WeightFormat.INT8: "engine.quantization.int8:Int8Matrix",
    WeightFormat.INT4: "engine.quantization.int4:PackedInt4Matrix",
    WeightFormat.AWQ: "engine.quantization.awq:AwqMatrix",
    WeightFormat.GPTQ: "engine.quantization.gptq:GptqMatrix",
    WeightFormat.NF4: "engine.quantization.nf4:Nf4Matrix",
    WeightFormat.BNB_INT8: "engine.quantization.int8:BnbInt8Matrix",
    WeightFormat.GGUF: "engine.quantization.gguf:GgufMatrix",
    WeightFormat.ONLINE_FP8: "engine.quantization.fp8:OnlineFp8Matrix",
    WeightFormat.ONLINE_INT8: "engine.quantization.int8:OnlineInt8Matrix",
    WeightFormat.ONLINE_INT4: "engine.quantization.int4:OnlineInt4Matrix",
}
"""Format to "module:class", a WeightMatrix made from (builder, parts, format)."""


def make_matrix(build: ParameterBuilder, parts: Sequence[MatrixPart]) -> WeightMatrix:
    """The parts, which have the same inputs, as one matrix; where their formats differ, as several behind one face."""
    runs = [(form, list(run)) for form, run in itertools.groupby(parts, lambda part: build.format_of(part.name))]
    matrices = [_make(build, run, form) for form, run in runs]
    return matrices[0] if len(matrices) == 1 else MixedMatrix(build, parts, matrices)


def make_input_divided(build: ParameterBuilder, part: MatrixPart) -> WeightMatrix:
    """A matrix whose inputs are divided over ranks, so that its outputs are summands. Where sums do not depend on the
    layout (D2), a ShardedMatrix of as many canonical shards as are this rank's: its outputs are float32 then."""
    parallel = build.mesh.config
    if parallel.determinism is not Determinism.D2:
        return make_matrix(build, [part])
    count = parallel.num_shards // part.inputs.degree
    splits = [Split(parallel.num_shards, part.inputs.index * count + shard) for shard in range(count)]
    return ShardedMatrix(build, [part], [make_matrix(build, [replace(part, inputs=split)]) for split in splits])


def _make(build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat | None) -> WeightMatrix:
    if form is None:
        return DenseMatrix(build, parts)
    module, _, name = MATRICES[form.kind].partition(":")
    matrix: WeightMatrix = getattr(importlib.import_module(module), name)(build, parts, form)
    return FixedOrderMatrix(build, parts, matrix) if build.mesh.config.is_deterministic else matrix


class MixedMatrix(WeightMatrix):
    """Parts in different formats."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], matrices: Sequence[WeightMatrix]) -> None:
        super().__init__(build, parts)
        self.matrices = nn.ModuleList(matrices)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        return torch.cat([matrix.rows(slice(None)) for matrix in self._each()])[index]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([matrix.forward(hidden) for matrix in self._each()], dim=-1)

    def _each(self) -> list[WeightMatrix]:
        return [matrix for matrix in self.matrices if isinstance(matrix, WeightMatrix)]
