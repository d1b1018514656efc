"""The native products by quantized weights, against the same matrices' rows as torch decodes them."""

import pytest
import torch
from torch.nn import functional

from engine.gguf.block_types import BLOCK_TYPES, QUANTIZED_TYPES
from engine.kernels.encoded_linear import can_decode, decode_rows, linear_encoded
from engine.kernels.linear import has_tiles
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization.registry import make_matrix
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="needs a CPU with AMX and the native library")

FORMS = {
    "fp8": MatrixFormat(WeightFormat.FP8),
    "fp8-blocks": MatrixFormat(WeightFormat.FP8_BLOCKS),
    "int8": MatrixFormat(WeightFormat.INT8),
    "bnb-int8": MatrixFormat(WeightFormat.BNB_INT8),
    "int4": MatrixFormat(WeightFormat.INT4, group_size=32),
    "int4-row": MatrixFormat(WeightFormat.INT4),
    "awq": MatrixFormat(WeightFormat.AWQ, group_size=64, symmetric=False),
    "online-int4": MatrixFormat(WeightFormat.ONLINE_INT4),
    "nf4": MatrixFormat(WeightFormat.NF4, group_size=64),
    **{name: MatrixFormat(WeightFormat.GGUF, gguf_type=name) for name in QUANTIZED_TYPES},
}
OUTPUT_SCALED = ("fp8", "int8", "bnb-int8")
"""Formats with a scale for each row, which multiplies the outputs."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, num_outputs: tuple[int, ...], num_inputs: int, dtype: torch.dtype = torch.bfloat16) -> WeightMatrix:
    """A matrix of parts one below another, of random codes and scales."""
    config = QuantizationConfig("", ((("Linear",), FORMS[name]),))
    build = ParameterBuilder(Mesh(), dtype, torch.device("cpu"), quantization=config)
    matrix = make_matrix(build, [MatrixPart(str(i), rows, num_inputs) for i, rows in enumerate(num_outputs)])
    for parameter in matrix.parameters():
        fill(parameter)
    if name == "fp8" or name == "fp8-blocks":
        codes = matrix.get_parameter("codes").view(torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    if name in QUANTIZED_TYPES:
        fill_half_scales(matrix.get_parameter("weight"), name)
    if (zeros := getattr(matrix, "zeros", None)) is not None:
        zeros &= 15
    return matrix


def fill(parameter: torch.Tensor) -> None:
    if parameter.dtype.itemsize == 1:
        parameter.view(torch.uint8).random_(0, 256)
    else:
        parameter.uniform_(-0.1, 0.1)


def fill_half_scales(weight: torch.Tensor, name: str) -> None:
    kind = QUANTIZED_TYPES[name]
    blocks = weight.view(-1, kind.block_bytes)
    for offset in kind.scale_offsets:
        blocks[:, offset : offset + 2] = torch.randn(len(blocks), 1).half().view(torch.uint8)


def rows_without_scales(name: str, matrix: WeightMatrix) -> torch.Tensor:
    if name in OUTPUT_SCALED:
        return matrix.get_parameter("codes").to(torch.bfloat16)
    return matrix.rows(slice(None))


def test_every_type_of_gguf_has_a_decoder() -> None:
    assert set(QUANTIZED_TYPES) == {kind.name for kind in BLOCK_TYPES.values() if kind.is_quantized} <= set(FORMS)


@needs_tiles
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("num_inputs", [256, 768])
def test_decoded_weights_are_those_of_rows(name: str, num_inputs: int) -> None:
    matrix = make(name, (128, 96), num_inputs)
    encoded = matrix.encoded()
    assert encoded is not None and can_decode(encoded)
    expected = rows_without_scales(name, matrix)
    assert expected.isfinite().all() and len(expected.unique()) > 16
    assert torch.equal(decode_rows(encoded, slice(None)), expected)
    assert torch.equal(decode_rows(encoded, slice(7, 130)), expected[7:130])


@needs_tiles
@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "int8", "int4-row"])
@pytest.mark.parametrize("num_inputs", [32, 672])
def test_inputs_that_fill_no_block(name: str, num_inputs: int) -> None:
    """The last piece of a row, and the last block of scales, are cut short."""
    matrix = make(name, (128, 160), num_inputs)
    encoded = matrix.encoded()
    assert encoded is not None
    assert torch.equal(decode_rows(encoded, slice(None)), rows_without_scales(name, matrix))
    check_product(matrix, 5)


def check_product(matrix: WeightMatrix, num_tokens: int) -> torch.Tensor:
    """One rounding to bfloat16 of sums in float32; and of each weight, where rows are scaled. Returns the product."""
    hidden = torch.randn(num_tokens, matrix.num_inputs).bfloat16()
    weights = matrix.rows(slice(None)).double()
    magnitudes = hidden.double().abs() @ weights.abs().t()
    product = matrix.forward(hidden)
    assert product.dtype == torch.bfloat16
    expected = hidden.double() @ weights.t()
    assert ((product.double() - expected).abs() <= expected.abs() * 2**-7 + magnitudes * 2**-9).all()
    return product


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 33, 128, 129])
def test_product(name: str, num_tokens: int) -> None:
    assert check_product(make(name, (128, 32), 768), num_tokens).shape == (num_tokens, 160)


@needs_tiles
@pytest.mark.parametrize("name", FORMS)
def test_sums_are_those_of_float64_rounded_once(name: str) -> None:
    matrix = make(name, (64,), 1024)
    encoded = matrix.encoded()
    assert encoded is not None
    hidden = torch.randn(40, 1024).bfloat16()
    weights = decode_rows(encoded, slice(None)).double()
    scales = torch.ones(64) if encoded.output_scales is None else encoded.output_scales
    weights *= scales.double().unsqueeze(1)
    expected = hidden.double() @ weights.t()
    magnitudes = hidden.double().abs() @ weights.t().abs()
    error = (linear_encoded(hidden, encoded).double() - expected).abs()
    assert (error <= expected.abs() * 2**-8 + magnitudes * 2**-20).all()


@needs_tiles
@pytest.mark.parametrize("name", FORMS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    matrix = make(name, (64,), 768)
    hidden = torch.randn(100, 768).bfloat16()
    together = matrix.forward(hidden)
    for i in (0, 1, 40, 99):
        assert torch.equal(matrix.forward(hidden[i : i + 1])[0], together[i])
    assert torch.equal(matrix.forward(hidden[20:60]), together[20:60])


@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "int8", "int4-row", "Q8_0"])
def test_outputs_that_the_kernel_does_not_take(name: str) -> None:
    """Decoded by torch."""
    matrix = make(name, (40,), 256)
    encoded = matrix.encoded()
    assert encoded is None or not can_decode(encoded)
    check_product(matrix, 3)


def test_parts_that_end_within_a_block() -> None:
    matrix = make("fp8-blocks", (64, 96), 256)
    assert matrix.encoded() is None
    check_product(matrix, 3)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_inputs_that_the_kernel_does_not_take(name: str) -> None:
    matrix = make(name, (64,), 72)
    encoded = matrix.encoded()
    assert encoded is not None and not can_decode(encoded)
    check_product(matrix, 3)


@pytest.mark.parametrize("name", FORMS)
def test_float32_is_exact(name: str) -> None:
    matrix = make(name, (64,), 256, torch.float32)
    hidden = torch.randn(3, 256)
    assert torch.equal(matrix.forward(hidden), functional.linear(hidden, matrix.rows(slice(None))))


@needs_tiles
def test_strided_tokens() -> None:
    matrix = make("nf4", (64,), 128)
    hidden = torch.randn(5, 256).bfloat16()[:, ::2]
    assert torch.equal(matrix.forward(hidden), matrix.forward(hidden.contiguous()))
