"""float8 weights against compressed-tensors' and transformers' own dequantization."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Dtype, ParallelConfig
from engine.errors import CheckpointError, LayoutError
from engine.model_config import ModelConfig
from engine.parameter import Split
from engine.quantization.fp8 import decode_e4m3, multiply_float8, quantize_rows
from engine.quantization.matrix import MatrixPart
from engine.weights.ledger import shard_bytes
from engine.weights.loader import verify_checkpoint
from tests.quantization.checkpoints import FORMATS, compressed_tensors_format, matrices
from tests.quantization.comparison import (
    SLICES,
    assert_matrix_equals,
    assert_same_answers,
    load_matrix,
    part_of,
)
from tests.quantization.conftest import Answers, Quantized
from tests.support.conformance import Conforms

ORACLES = {
    "fp8-channel": "compressed-tensors",
    "fp8-tensor-static": "compressed-tensors",
    "fp8-block": "compressed-tensors",
    "fp8-fbgemm": "compressed-tensors",
    "fp8-autofp8": "compressed-tensors",
    "fp8-deepseek": "transformers",
}
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_rows_are_the_librarys(quantized: Quantized, name: str, outputs: Split, inputs: Split) -> None:
    """Bit for bit in float32, and rounded once in bfloat16; three fused matrices each with scales of its own."""
    made = quantized(FORMATS[name], "llama")
    for dtype in (torch.float32, torch.bfloat16):
        assert_matrix_equals(made.directory, DOWN if inputs.degree > 1 else QKV, made.values, outputs, inputs, dtype)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ORACLES)
def test_llama(quantized: Quantized, answers: Answers, conforms: Conforms, name: str, tp: int) -> None:
    conforms("Llama", name, tp=tp, oracle=ORACLES[name])
    assert_same_answers(answers(FORMATS, "llama", tp, 1)[name], quantized(FORMATS[name], "llama").expected)


@pytest.mark.parametrize("name", ORACLES)
def test_mixture_of_experts(quantized: Quantized, answers: Answers, conforms: Conforms, name: str) -> None:
    """Experts are stored one by one, as in Maverick's FP8 checkpoint, where the float one has them fused."""
    conforms("Llama 4", name, tp=2, ep=2, oracle=ORACLES[name])
    assert_same_answers(answers(FORMATS, "moe", 2, 2)[name], quantized(FORMATS[name], "moe").expected)


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "int8-bitsandbytes"])
def test_the_ledger_counts_every_byte(quantized: Quantized, name: str) -> None:
    """What a rank holds is what the checkpoint holds, scales included; two ranks hold little more together."""
    made = quantized(FORMATS[name], "moe")
    config = ModelConfig.from_directory(made.directory)
    tensors = load_file(made.directory / "model.safetensors").values()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert shard_bytes(config, ParallelConfig(), 0, Dtype.FLOAT32).total == stored
    half = shard_bytes(config, ParallelConfig(tp=2, ep=2), 1, Dtype.FLOAT32)
    assert 0.5 * stored < half.total < 0.52 * stored
    as_float = shard_bytes(ModelConfig.from_directory(made.float_directory), ParallelConfig(), 0, Dtype.BFLOAT16)
    quarter_more = shard_bytes(config, ParallelConfig(), 0, Dtype.BFLOAT16).by_kind["experts"]
    assert 0.5 * as_float.by_kind["experts"] < quarter_more < 0.51 * as_float.by_kind["experts"]


def test_a_block_that_ranks_would_share_is_refused(quantized: Quantized) -> None:
    made = quantized(FORMATS["fp8-deepseek"], "llama")
    for outputs, inputs, what in ((Split(4, 0), Split(), "rows"), (Split(), Split(4, 3), "columns")):
        with pytest.raises(LayoutError, match=rf"q_proj: 4 ranks would hold 64 of its 256 {what} each.*blocks of 128"):
            load_matrix(made.directory, [part_of(QKV[0], made.values, outputs, inputs)])
    config = ModelConfig.from_directory(made.directory)
    with pytest.raises(LayoutError, match="use a smaller tp"):
        shard_bytes(config, ParallelConfig(tp=4), 0, Dtype.BFLOAT16)


def test_the_last_block_may_be_cut_short(float_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks of 96 × 160 in matrices [256, 256]: each of the fused parts ends with blocks of their own."""
    form = compressed_tensors_format(
        "fp8-odd-block",
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [96, 160]},
    )
    form.quantize(float_dir("llama"), tmp_path)
    values = form.dequantized(float_dir("llama"))
    assert_matrix_equals(tmp_path, QKV, values, Split(), Split(), torch.float32)


def test_bfloat16_scales(quantized: Quantized, tmp_path: Path) -> None:
    """As most checkpoints store them: compressed-tensors multiplies in bfloat16 then, and so do we."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    made = quantized(FORMATS["fp8-channel"], "llama")
    shutil.copy(made.directory / "config.json", tmp_path)
    tensors = load_file(made.directory / "model.safetensors")
    tensors = {name: t.bfloat16() if name.endswith("_scale") else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    stored = {local: tensors[f"{QKV[0]}.{local}"] for local in ("weight", "weight_scale")}
    values = {QKV[0]: compressor.decompress(stored, scheme)["weight"]}
    assert values[QKV[0]].dtype == torch.bfloat16
    assert_matrix_equals(tmp_path, QKV[:1], values, Split(), Split(), torch.bfloat16)


def test_every_code_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()]
    assert len(codes) == 254
    assert torch.equal(decode_e4m3(codes).float(), codes.float())


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block"])
def test_bfloat16_products_are_as_exact_as_the_dequantized_weights(quantized: Quantized, name: str) -> None:
    made = quantized(FORMATS[name], "llama")
    matrix = load_matrix(made.directory, [part_of(QKV[0], made.values, Split(), Split())], torch.bfloat16)
    hidden = torch.randn(9, 256).bfloat16()
    exact = hidden.double() @ made.values[QKV[0]].double().t()
    ours = (matrix.forward(hidden).double() - exact).abs().mean()
    dense = (torch.matmul(hidden, matrix.rows(slice(None)).t()).double() - exact).abs().mean()
    assert ours <= 1.1 * dense < 0.01 * exact.abs().mean()


@pytest.mark.parametrize("bound", [None, 2.0])
def test_both_sides_in_float8(bound: float | None) -> None:
    """What GPUs compute, through the same operation on the CPU: each token has its own scale, and fbgemm's bound cuts
    off what is above it."""
    hidden = torch.randn(5, 64).bfloat16() * torch.tensor([0.01, 1, 30, 0, 1]).bfloat16()[:, None]
    codes, scales = quantize_rows(torch.randn(32, 64))
    inputs, input_scales = quantize_rows(hidden, bound)
    kept = hidden.float() if bound is None else hidden.float().clamp(-bound, bound)
    torch.testing.assert_close(inputs.float() * input_scales, kept, rtol=2**-4, atol=float(input_scales.max()) * 2**-9)
    expected = (inputs.float() * input_scales) @ (codes.float() * scales).t()
    torch.testing.assert_close(multiply_float8(hidden, codes, scales, bound).float(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.gpu
def test_both_sides_in_float8_on_a_gpu() -> None:
    device = torch.device("cuda")
    hidden = torch.randn(5, 64, device=device).bfloat16()
    codes, scales = quantize_rows(torch.randn(32, 64, device=device))
    inputs, input_scales = quantize_rows(hidden)
    expected = (inputs.float() * input_scales) @ (codes.float() * scales).t()
    torch.testing.assert_close(multiply_float8(hidden, codes, scales).float(), expected, rtol=2**-6, atol=2e-2)


def test_what_does_not_suit_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    """A scale that is missing or misshaped, and a matrix that is not quantized although its config says so."""
    made = quantized(FORMATS["fp8-channel"], "llama")
    tensors = load_file(made.directory / "model.safetensors")
    shutil.copy(made.directory / "config.json", tmp_path)
    for change, message in (
        ({f"{QKV[1]}.weight_scale": None}, f"has no tensor '{QKV[1]}.weight_scale'"),
        ({f"{QKV[1]}.weight_scale": torch.ones(1)}, r"shape \[1\]; config.json makes it \[256, 1\]"),
        ({f"{QKV[1]}.weight": torch.ones(256, 256)}, "in format F32; expected is F8_E4M3"),
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(tmp_path, ModelConfig.from_directory(tmp_path))


def test_a_weight_that_is_no_number_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized(FORMATS["fp8-channel"], "llama")
    tensors = load_file(made.directory / "model.safetensors")
    tensors[f"{QKV[1]}.weight"].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(made.directory / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=f"tensor '{QKV[1]}.weight' holds NaN"):
        load_matrix(tmp_path, [MatrixPart(QKV[1], 256, 256)])


def test_matrices_left_alone_stay_float(float_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """405B's way: the config names what is not converted, here one matrix of a fused three."""
    FORMATS["fp8-fbgemm"].quantize(float_dir("llama"), tmp_path)
    values = FORMATS["fp8-fbgemm"].dequantized(float_dir("llama"))
    original = matrices(float_dir("llama"))[QKV[1]]
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{QKV[1]}.weight_scale"]
    tensors[f"{QKV[1]}.weight"] = original
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", QKV[1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_matrix_equals(tmp_path, QKV, values | {QKV[1]: original}, Split(2, 1), Split(), torch.float32)
