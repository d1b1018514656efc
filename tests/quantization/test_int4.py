"""Int4 as compressed-tensors packs it, against its own decompression, and int4 from float checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from engine.config import Dtype, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.model_config import ModelConfig
from engine.parameter import Split
from engine.quantization import online
from engine.quantization.int4 import OnlineInt4Matrix
from engine.quantization.matrix import FloatSource, MatrixPart
from engine.weights.ledger import shard_bytes
from tests.quantization.checkpoints import matrices, write_float
from tests.quantization.comparison import (
    SLICES,
    assert_matrix_equals,
    assert_same_answers,
    cut,
    load_matrix,
    part_of,
    run_gang,
)
from tests.quantization.conftest import Answers, Quantized
from tests.quantization.four_bit_checkpoints import (
    FORMATS,
    INT4_EXPERTS,
    change_tensors,
    dequantize_groups,
    in_order,
    quantize_groups,
    shuffled,
)
from tests.support.conformance import Conforms

KINDS = ["int4-group", "int4-asymmetric", "int4-channel", "int4-asymmetric-channel"]
ORACLE = "compressed-tensors"
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]
FloatDir = Callable[[str], Path]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_rows_are_the_librarys(quantized: Quantized, name: str, outputs: Split, inputs: Split) -> None:
    made = quantized(FORMATS[name], "llama")
    names = DOWN if inputs.degree > 1 else QKV
    assert_matrix_equals(made.directory, names, made.values, outputs, inputs, torch.float32)


@pytest.mark.parametrize("name", ["int4-group", "int4-asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision(quantized: Quantized, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """As checkpoints are: scales in the model's format, in which the library multiplies too."""
    directory = quantized(FORMATS[name], "llama").directory
    tensors = load_file(directory / "model.safetensors")
    scales = {key: value.to(dtype) for key, value in tensors.items() if key.endswith("weight_scale")}
    change_tensors(directory, tmp_path, scales)
    values = {}
    for module in (*QKV, *DOWN):
        stored = {
            key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")
        }
        stored["weight_scale"] = scales[f"{module}.weight_scale"]
        scheme = QuantizationScheme(targets=["Linear"], weights=_arguments(directory))
        values[module] = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert values[module].dtype == dtype
    for outputs, inputs in SLICES:
        assert_matrix_equals(tmp_path, DOWN if inputs.degree > 1 else QKV, values, outputs, inputs, dtype)


def _arguments(directory: Path) -> QuantizationArgs:
    config = json.loads((directory / "config.json").read_text())
    return QuantizationArgs(**config["quantization_config"]["config_groups"]["group_0"]["weights"])


@pytest.mark.parametrize("name", KINDS)
def test_llama(quantized: Quantized, answers: Answers, conforms: Conforms, name: str) -> None:
    conforms("Llama", name, tp=2, oracle=ORACLE)
    assert_same_answers(answers(FORMATS, "llama", 2, 1)[name], quantized(FORMATS[name], "llama").expected)


@pytest.mark.parametrize(("kind", "model", "ep"), [("mixtral", "Mixtral", 2), ("moe", "Llama 4", 1)])
def test_experts(quantized: Quantized, answers: Answers, conforms: Conforms, kind: str, model: str, ep: int) -> None:
    conforms(model, "int4-group", tp=2 if ep == 2 else 1, ep=ep, oracle=ORACLE)
    formats = INT4_EXPERTS if ep == 2 else {"int4-group": FORMATS["int4-group"]}
    given = answers(formats, kind, 2 if ep == 2 else 1, ep)["int4-group"]
    assert_same_answers(given, quantized(FORMATS["int4-group"], kind).expected)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_inputs_in_another_order(quantized: Quantized, tmp_path: Path, is_symmetric: bool) -> None:
    """``weight_g_idx``, which compressed-tensors wrote until it dropped ``actorder: group``: by its definition."""
    directory = quantized(FORMATS["int4-group" if is_symmetric else "int4-asymmetric"], "llama").directory
    orders = {f"{module}.weight_g_idx": torch.from_numpy(shuffled(256, 64, module).astype(np.int32)) for module in QKV}
    tensors = load_file(directory / "model.safetensors")
    changed, values = dict(orders), {}
    for module in QKV:
        scale = torch.rand(256, 4)
        changed[f"{module}.weight_scale"] = scale
        packed, zeros = tensors[f"{module}.weight_packed"], torch.full((256, 4), 8)
        if not is_symmetric:
            words = torch.randint(-(2**31), 2**31 - 1, (32, 4), dtype=torch.int32)
            changed[f"{module}.weight_zero_point"] = words
            zeros = torch.stack([(words[row // 8] >> (4 * (row % 8))) & 15 for row in range(256)])
        codes = torch.stack([(packed[:, column // 8] >> (4 * (column % 8))) & 15 for column in range(256)], dim=1)
        order = orders[f"{module}.weight_g_idx"].long()
        values[module] = (codes - zeros[:, order]).float() * scale[:, order]
    change_tensors(directory, tmp_path, changed)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_matrix_equals(tmp_path, QKV, values, Split(2, 1), Split(), torch.float32)
    assert_matrix_equals(tmp_path, QKV[:1], values, Split(), Split(8, 3), torch.float32)


def test_a_layout_that_cuts_is_refused(quantized: Quantized) -> None:
    made = quantized(FORMATS["int4-group"], "llama")
    config = ModelConfig.from_directory(made.directory)
    message = "o_proj cannot be divided over 4 ranks: 64 of 256 each would cut groups of 128 inputs; over 2 it can"
    with pytest.raises(LayoutError, match=f"model.layers.0.self_attn.{message}"):
        shard_bytes(config, ParallelConfig(tp=4), 0, Dtype.BFLOAT16)
    for name, outputs, inputs, what in (
        ("int4-channel", Split(), Split(64, 1), "words of 8 inputs"),
        ("int4-asymmetric", Split(64, 1), Split(), "words of 8 outputs"),
    ):
        made = quantized(FORMATS[name], "llama")
        with pytest.raises(
            LayoutError, match=f"q_proj cannot be divided over 64 ranks: 4 of 256 each would cut {what}"
        ):
            load_matrix(made.directory, [part_of(QKV[0], made.values, outputs, inputs)])


def test_a_wrong_tensor_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized(FORMATS["int4-asymmetric"], "llama")
    for change, message in (
        ({"weight_packed": torch.zeros(256, 16, dtype=torch.int32)}, r"\[256, 16\]; config.json makes it \[256, 32\]"),
        ({"weight_zero_point": None}, "has no tensor 'model.layers.0.self_attn.q_proj.weight_zero_point'"),
        ({"weight_scale": torch.full((256, 4), torch.nan)}, "'model.layers.0.self_attn.q_proj.weight_scale' holds NaN"),
    ):
        change_tensors(made.directory, tmp_path, {f"{QKV[0]}.{key}": value for key, value in change.items()})
        with pytest.raises(CheckpointError, match=message):
            load_matrix(tmp_path, [part_of(QKV[0], made.values, Split(), Split())])


def rounded(value: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in]: what a group's sixteen values make of float32 weights."""
    by_input = value.numpy().T
    groups = in_order(len(by_input), group_size)
    return dequantize_groups(*quantize_groups(by_input, groups, np.float32), groups)


@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [
    (Split(), Split(), 128), (Split(2, 1), Split(), 128), (Split(), Split(2, 1), 128), (Split(), Split(8, 3), 32),
])  # fmt: skip
def test_online(float_dir: FloatDir, outputs: Split, inputs: Split, group_size: int) -> None:
    """Groups are as large as a rank's share of the inputs allows."""
    values = matrices(float_dir("llama"))
    parts = [part_of(name, values, outputs, inputs) for name in QKV]
    matrix = load_matrix(float_dir("llama"), parts, quantization="int4")
    assert isinstance(matrix, OnlineInt4Matrix)
    expected = torch.cat([rounded(cut(values[name], outputs, inputs), group_size) for name in QKV])
    assert torch.equal(matrix.rows(slice(None)), expected)
    original = torch.cat([cut(values[name], outputs, inputs) for name in QKV])
    assert ((expected - original).abs() <= matrix.scales.repeat_interleave(group_size, 1) * 1.001).all()


def test_online_from_fused_experts(float_dir: FloatDir) -> None:
    values = matrices(float_dir("moe"))
    experts, split = "model.layers.1.feed_forward.experts", Split(2, 1)
    parts = [
        MatrixPart("2.gate_proj", 256, 256, split, fused=FloatSource("gate_up_proj", (4, 256, 512), (2, 0, 128))),
        MatrixPart("2.up_proj", 256, 256, split, fused=FloatSource("gate_up_proj", (4, 256, 512), (2, 0, 384))),
    ]
    matrix = load_matrix(float_dir("moe"), parts, quantization="int4", prefix=f"{experts}.")
    expected = [rounded(values[f"{experts}.2.{part}_proj"][128:], 128) for part in ("gate", "up")]
    assert torch.equal(matrix.rows(slice(None)), torch.cat(expected))


@pytest.mark.parametrize(("kind", "model", "tp"), [("moe", "Llama 4", 2), ("llama", "Llama", 1)])
def test_online_models(float_dir: FloatDir, tmp_path: Path, conforms: Conforms, kind: str, model: str, tp: int) -> None:
    conforms(model, "--quantization int4", tp=tp, oracle="rounding in numpy")
    values = {name: rounded(value, 128) for name, value in matrices(float_dir(kind)).items()}
    write_float(float_dir(kind), tmp_path, values)
    (expected,) = run_gang([tmp_path], tp=1, ep=1)
    (ours,) = run_gang([float_dir(kind)], tp, 1, quantization="int4")
    assert_same_answers(ours, expected)


def test_online_shares_that_no_group_divides_are_refused(float_dir: FloatDir) -> None:
    message = r"q_proj cannot be quantized to int4: none .* 128, 64, 32 divides its 16 inputs on each of 16 ranks"
    with pytest.raises(LayoutError, match=message):
        load_matrix(float_dir("llama"), [MatrixPart(QKV[0], 256, 256, Split(), Split(16, 1))], quantization="int4")


def test_online_groups_of_one_sign(float_dir: FloatDir, tmp_path: Path) -> None:
    """Zero is always among a group's sixteen values, so that codes reach from it to the farthest weight."""
    values: dict[str, Any] = matrices(float_dir("llama"))
    rows = values[QKV[0]].clone()
    rows[3, :128] = 0
    rows[4, :128] = rows[4, :128].abs() + 10
    rows[5, :128] = -rows[5, :128].abs() - 10
    write_float(float_dir("llama"), tmp_path, values | {QKV[0]: rows})
    matrix = load_matrix(tmp_path, [MatrixPart(QKV[0], 256, 256)], quantization="int4")
    assert isinstance(matrix, OnlineInt4Matrix)
    assert matrix.rows(slice(3, 4))[:, :128].abs().max() == 0
    assert matrix.rows(slice(3, 4))[:, 128:].abs().max() > 0
    for row in (4, 5):
        difference = (matrix.rows(slice(row, row + 1)) - rows[row])[0, :128]
        assert (difference.abs() <= matrix.scales[row, 0] * 0.501).all()


def test_online_does_not_depend_on_tiles(float_dir: FloatDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a CPU's product wants together are never in two tiles."""
    parts = [MatrixPart(name, 256, 256) for name in QKV]
    whole = load_matrix(float_dir("llama"), parts, torch.bfloat16, quantization="int4")
    monkeypatch.setattr(online, "TILE_BYTES", 100 * 256 * 4)
    in_tiles = load_matrix(float_dir("llama"), parts, torch.bfloat16, quantization="int4")
    assert torch.equal(in_tiles.rows(slice(None)), whole.rows(slice(None)))
