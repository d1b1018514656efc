"""int8 weights against compressed-tensors' and bitsandbytes' own dequantization."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.kernels.linear import can_multiply_int8
from engine.model_config import ModelConfig
from engine.parameter import Split
from engine.quantization.int8 import SignedByteMatrix
from engine.weights.loader import verify_checkpoint
from tests.quantization.checkpoints import FORMATS, write_quantized
from tests.quantization.comparison import SLICES, assert_matrix_equals, assert_same_answers, load_matrix, part_of
from tests.quantization.conftest import Answers, Quantized
from tests.support.conformance import Conforms

ORACLES = {"int8-channel": "compressed-tensors", "int8-bitsandbytes": "bitsandbytes"}
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
DOWN = ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("outputs", "inputs"), SLICES)
def test_rows_are_the_librarys(quantized: Quantized, name: str, outputs: Split, inputs: Split) -> None:
    """Bit for bit in float32, and rounded once in bfloat16."""
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
    conforms("Llama 4", name, tp=2, ep=2, oracle=ORACLES[name])
    assert_same_answers(answers(FORMATS, "moe", 2, 2)[name], quantized(FORMATS[name], "moe").expected)


@pytest.mark.parametrize("num_tokens", [1, 8, 40])
@pytest.mark.parametrize("name", ORACLES)
def test_bfloat16_products(quantized: Quantized, name: str, num_tokens: int) -> None:
    """By the operation for few tokens and by tiles: as exact as the dequantized weights in bfloat16 would be. With
    activations rounded too (where the CPU and the format allow it) the error is that of 8 bits for each token."""
    made = quantized(FORMATS[name], "llama")
    matrix = load_matrix(made.directory, [part_of(QKV[0], made.values, Split(), Split())], torch.bfloat16)
    assert isinstance(matrix, SignedByteMatrix)
    hidden = torch.randn(num_tokens, 256).bfloat16()
    exact = hidden.double() @ made.values[QKV[0]].double().t()
    size = exact.abs().mean()
    dense = (torch.matmul(hidden, matrix.rows(slice(None)).t()).double() - exact).abs().mean()
    whole = (SignedByteMatrix.__base__.forward(matrix, hidden).double() - exact).abs().mean()
    assert whole <= 1.1 * dense < 0.01 * size
    ours = (matrix.forward(hidden).double() - exact).abs().mean()
    rounds = name == "int8-channel" and can_multiply_int8(matrix.codes, torch.bfloat16)
    assert ours < 0.02 * size if rounds else ours <= 1.1 * dense


def test_sizes_that_fit_no_vector_unit(tmp_path: Path, quantized: Quantized) -> None:
    """A matrix [13, 20]: torch's operation for int8 would read past its end."""
    from bitsandbytes import functional

    made = quantized(FORMATS["int8-bitsandbytes"], "llama")
    codes, maxima, _ = functional.int8_vectorwise_quant(torch.randn(13, 20).half())
    scheme = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write_quantized(made.float_directory, tmp_path, {"odd.weight": codes, "odd.SCB": maxima}, scheme)
    values = {"odd": functional.int8_vectorwise_dequant(codes, maxima)}
    matrix = load_matrix(tmp_path, [part_of("odd", values, Split(), Split())], torch.bfloat16)
    for num_tokens in (1, 9):
        hidden = torch.randn(num_tokens, 20).bfloat16()
        expected = hidden.double() @ values["odd"].double().t()
        torch.testing.assert_close(matrix.forward(hidden).double(), expected, rtol=2**-7, atol=2e-2)


def test_other_layouts_are_refused(tmp_path: Path, quantized: Quantized) -> None:
    """A float matrix where int8 is due names tensor and formats."""
    made = quantized(FORMATS["int8-channel"], "llama")
    tensors = load_file(made.directory / "model.safetensors")
    tensors[f"{DOWN[0]}.weight"] = tensors[f"{DOWN[0]}.weight"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(made.directory / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=f"'{DOWN[0]}.weight' is in format F32; expected is I8"):
        verify_checkpoint(tmp_path, ModelConfig.from_directory(tmp_path))
