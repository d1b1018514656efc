"""How a quantized checkpoint is held against what its own library says its weights are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder, Split
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization.registry import make_matrix
from engine.weights.loader import load_weights
from tests.quantization.checkpoints import Format, Tensors, write_float
from tests.support.model_driver import Generated, ModelDriver, generate_alone
from tests.support.rank_pool import RankContext, run_ranks

PROMPTS = [list(range(3, 24)), [7, 1, 5]]
NUM_NEW = 4
SLICES = [(Split(), Split()), (Split(2, 1), Split()), (Split(), Split(2, 1))]
"""Of outputs and inputs: all of a matrix, rows and columns."""


@dataclass
class Made:
    """``directory``: the quantized checkpoint. ``values``: what its library says its matrices are. ``expected``: what
    our model computes with these as float weights, and ``float_directory`` the checkpoint for that."""

    form: Format
    directory: Path
    float_directory: Path
    values: Tensors
    expected: list[Generated]


def make(form: Format, float_dir: Path, scratch: Path) -> Made:
    directory, float_directory = scratch / "quantized", scratch / "float"
    form.quantize(float_dir, directory)
    values = form.dequantized(float_dir)
    write_float(float_dir, float_directory, {name: value.float() for name, value in values.items()})
    (expected,) = run_gang([float_directory], tp=1, ep=1)
    return Made(form, directory, float_directory, values, expected)


def load_matrix(
    directory: Path,
    parts: Sequence[MatrixPart],
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    prefix: str = "",
) -> WeightMatrix:
    """One matrix of a checkpoint, as a layer would hold it."""
    config = ModelConfig.from_directory(directory, quantization)
    build = ParameterBuilder(Mesh(), dtype, torch.device("cpu"), prefix, config.quantization)
    matrix = make_matrix(build, parts)
    load_weights(SimpleNamespace(config=config, slices=build.slices, conversions=build.conversions), directory)  # type: ignore[arg-type]
    return matrix


def part_of(name: str, values: Tensors, outputs: Split, inputs: Split) -> MatrixPart:
    return MatrixPart(name, *values[name].shape, outputs, inputs)


def cut(value: torch.Tensor, outputs: Split, inputs: Split) -> torch.Tensor:
    rows, columns = value.shape
    start, first = outputs.start(rows), inputs.start(columns)
    return value[start : start + outputs.size(rows), first : first + inputs.size(columns)]


def assert_matrix_equals(
    directory: Path, names: Sequence[str], values: Tensors, outputs: Split, inputs: Split, dtype: torch.dtype
) -> None:
    """The matrices ``names`` fused into one, cut, hold exactly ``values``; whole, by slice and by index."""
    matrix = load_matrix(directory, [part_of(name, values, outputs, inputs) for name in names], dtype)
    expected = torch.cat([cut(values[name], outputs, inputs) for name in names]).to(dtype)
    some = torch.tensor([5, 0, len(expected) - 1])
    for index in (slice(None), slice(3, 77), some):
        rows = matrix.rows(index)
        assert rows.dtype == dtype
        assert torch.equal(rows, expected[index])
    assert (matrix.num_outputs, matrix.num_inputs) == expected.shape


def run_gang(directories: Sequence[Path], tp: int, ep: int, quantization: str | None = None) -> list[list[Generated]]:
    """What one gang computes in float32 with each checkpoint, one after the other."""
    if tp == 1:
        return [_run(directory, Mesh(), quantization) for directory in directories]
    results: list[list[list[Generated]]] = run_ranks(_run_rank, tp, list(directories), tp, ep, quantization)
    return results[0]


def _run(directory: Path, mesh: Mesh, quantization: str | None) -> list[Generated]:
    model = build_model(ModelConfig.from_directory(directory, quantization), mesh, Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, directory)
    return generate_alone(ModelDriver(model, mesh, torch.float32), PROMPTS, NUM_NEW)


def _run_rank(context: RankContext, directories: list[Path], tp: int, ep: int, quantization: str | None) -> Any:
    parallel = ParallelConfig(tp=tp, ep=ep)
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), timeout_s=30.0)
    return [_run(directory, mesh, quantization) for directory in directories]


def assert_same_answers(ours: Sequence[Generated], expected: Sequence[Generated]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert theirs.logits.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        assert mine.token_ids == theirs.token_ids
        np.testing.assert_allclose(mine.logits, theirs.logits, rtol=0, atol=1e-4)
