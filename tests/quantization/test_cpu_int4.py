"""torch's own int4 product on CPUs without tile units, against the same weights in float32; and all forms of int4 with
random shapes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder, Split
from engine.quantization import cpu_int4, grouped_int4
from engine.quantization.grouped_int4 import GroupedInt4Matrix
from engine.quantization.matrix import MatrixPart
from engine.quantization.registry import make_matrix
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat
from tests.quantization.four_bit_checkpoints import (
    dequantize_awq,
    dequantize_gptq,
    in_order,
    quantize_awq,
    quantize_gptq,
    shuffled,
)

HAS_PRODUCT = torch.backends.cpu.get_cpu_capability() == "AVX512"
AWQ = MatrixFormat(WeightFormat.AWQ, 64, symmetric=False)
ONLINE = MatrixFormat(WeightFormat.ONLINE_INT4, 128, symmetric=False)
PACKED = MatrixFormat(WeightFormat.INT4, 32)


@pytest.fixture(autouse=True, scope="module")
def _no_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_int4, "has_tiles", lambda: False)
        yield


def load(
    form: MatrixFormat, parts: list[MatrixPart], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> GroupedInt4Matrix:
    """Made as the loader makes it, from tensors in memory."""
    build = ParameterBuilder(Mesh(), dtype, torch.device("cpu"), "", QuantizationConfig("test", ((("Linear",), form),)))
    matrix = make_matrix(build, parts)
    for conversion in build.conversions:
        conversion.convert(
            *(
                tensors[source.name][tuple(slice(s, s + n) for s, n in zip(source.start, source.size, strict=True))]
                for source in conversion.sources
            )
        )
    assert isinstance(matrix, GroupedInt4Matrix)
    return matrix


def example(form: MatrixFormat) -> GroupedInt4Matrix:
    """Two parts of 128 and 64 rows with 256 inputs in bfloat16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rows in (("a", 128), ("b", 64)):
        weight = torch.randn(rows, 256) + 0.3
        if form is AWQ:
            tensors |= {f"{name}.{key}": value for key, value in quantize_awq(weight, 64).items()}
        tensors |= {
            f"{name}.weight": weight,
            f"{name}.weight_packed": torch.randint(-(2**31), 2**31 - 1, (rows, 32), dtype=torch.int32),
            f"{name}.weight_scale": torch.rand(rows, 8),
        }
    return load(form, [MatrixPart("a", 128, 256), MatrixPart("b", 64, 256)], tensors, torch.bfloat16)


@pytest.mark.parametrize("form", [AWQ, ONLINE, PACKED], ids=lambda form: form.kind)
@pytest.mark.parametrize("num_tokens", [1, 5, cpu_int4.MAX_TOKENS, cpu_int4.MAX_TOKENS + 1])
def test_product(form: MatrixFormat, num_tokens: int) -> None:
    """Within the rounding of weights, and of what a group adds, to bfloat16."""
    matrix = example(form)
    hidden = torch.randn(num_tokens, 256).bfloat16()
    weights = matrix.rows(slice(None)).float()
    exact = hidden.float() @ weights.t()
    scales = matrix.scales.float().repeat_interleave(256 // matrix.scales.shape[1], dim=1)
    bound = hidden.float().abs() @ (weights.abs() + 8 * scales).t() * 2**-8
    assert ((matrix.forward(hidden).float() - exact).abs() <= bound).all()


@pytest.mark.skipif(not HAS_PRODUCT, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("num_tokens", [1, cpu_int4.MAX_TOKENS])
def test_few_tokens_convert_no_weights(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    matrix = example(AWQ)
    hidden = torch.randn(num_tokens, 256).bfloat16()
    expected = matrix.forward(hidden)
    monkeypatch.delattr(GroupedInt4Matrix, "rows")
    assert torch.equal(matrix.forward(hidden), expected)


def test_no_tokens() -> None:
    assert example(AWQ).forward(torch.empty(0, 256).bfloat16()).shape == (0, 192)


@pytest.mark.skipif(not HAS_PRODUCT, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("form", [AWQ, ONLINE, PACKED], ids=lambda form: form.kind)
def test_the_order_of_bytes_changes_no_row(monkeypatch: pytest.MonkeyPatch, form: MatrixFormat) -> None:
    """Rows are the same where the codes stand as the product wants them and where they do not."""
    state = torch.get_rng_state()
    blocked = example(form)
    torch.set_rng_state(state)
    monkeypatch.setattr(cpu_int4, "can_multiply", lambda *arguments: False)
    plain = example(form)
    assert not torch.equal(blocked.codes, plain.codes)
    for index in (slice(None), slice(3, 77), slice(64, 128), slice(130, 131), torch.tensor([191, 0, 64, 64])):
        assert torch.equal(blocked.rows(index), plain.rows(index))


@pytest.mark.skipif(not HAS_PRODUCT, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize(
    ("rows", "group_size", "dtype", "expected"),
    [
        ([128, 64], 64, torch.bfloat16, True),
        ([128, 32], 64, torch.bfloat16, False),
        ([128], 16, torch.bfloat16, False),
        ([128], 64, torch.float32, False),
    ],
)
def test_when_it_serves(rows: list[int], group_size: int, dtype: torch.dtype, expected: bool) -> None:
    assert cpu_int4.can_multiply(dtype, torch.device("cpu"), group_size, rows) is expected
    assert not cpu_int4.can_multiply(dtype, torch.device("meta"), group_size, rows)


@given(num_blocks=st.integers(1, 3), num_inputs=st.integers(1, 20).map(lambda n: 2 * n), seed=st.integers(0, 2**32 - 1))
def test_blocks_of_rows_come_back(num_blocks: int, num_inputs: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (64 * num_blocks, num_inputs), np.uint8))
    assert torch.equal(cpu_int4.unpack_blocks(cpu_int4.pack_blocks(codes)), codes)


@settings(max_examples=30)
@given(
    form=st.sampled_from(["awq", "gptq", "gptq-v2", "desc-act"]),
    group_size=st.sampled_from([8, 16, 32, 128]),
    num_groups=st.integers(1, 4),
    rows=st.lists(st.integers(1, 9).map(lambda n: 8 * n), min_size=1, max_size=3),
    cut=st.sampled_from(["outputs", "inputs", "nothing"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    form: str, group_size: int, num_groups: int, rows: list[int], cut: str, dtype: torch.dtype, seed: int
) -> None:
    """Every rank's rows are its cut of what the description gives, for whatever parts, groups and degree."""
    generator = torch.Generator().manual_seed(seed)
    degree = 2
    num_inputs = group_size * num_groups * (degree if cut == "inputs" else 1)
    rows = [count * (degree if cut == "outputs" else 1) for count in rows]
    tensors: dict[str, torch.Tensor] = {}
    values = []
    for part, count in enumerate(rows):
        weight = torch.randn(count, num_inputs, generator=generator)
        if form == "awq":
            made = quantize_awq(weight, group_size)
            values.append(dequantize_awq(made))
        else:
            order = in_order(num_inputs, group_size)
            if form == "desc-act":
                order = shuffled(num_inputs, group_size, f"{part} {seed}")
            made = quantize_gptq(weight, order, form != "gptq-v2")
            values.append(dequantize_gptq(made, form != "gptq-v2"))
        tensors |= {f"{part}.{key}": tensor for key, tensor in made.items()}
    kind = MatrixFormat(
        WeightFormat.AWQ if form == "awq" else WeightFormat.GPTQ,
        group_size,
        symmetric=False,
        stores_zero_minus_one=form != "gptq-v2",
        reorders_inputs=form == "desc-act",
    )
    for rank in range(1 if cut == "nothing" else degree):
        split = Split(degree, rank)
        outputs, inputs = split if cut == "outputs" else Split(), split if cut == "inputs" else Split()
        parts = [MatrixPart(str(part), count, num_inputs, outputs, inputs) for part, count in enumerate(rows)]
        expected = [
            value.chunk(outputs.degree)[outputs.index].chunk(inputs.degree, dim=1)[inputs.index] for value in values
        ]
        assert torch.equal(load(kind, parts, tensors, dtype).rows(slice(None)), torch.cat(expected).to(dtype))
