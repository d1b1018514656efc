"""Norms and SwiGLU against float64, over row lengths that fill blocks and that do not."""

import pytest
import torch

from engine.kernels.triton.rms_norm import add_rms_norm, rms_norm
from engine.kernels.triton.silu_multiply import silu_multiply
from tests.kernels.triton import references as expected
from tests.kernels.triton.references import check_close, randn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("size", [1, 100, 128, 1000])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype: torch.dtype, size: int, weighted: bool) -> None:
    rows, weight = randn(5, size, dtype=dtype), randn(size, dtype=dtype) if weighted else None
    check_close(rms_norm(rows, weight, 1e-5), expected.rms_norm(rows, weight, 1e-5))


def test_rms_norm_of_heads_that_are_columns_of_a_wider_matrix() -> None:
    wide = randn(6, 10 * 24, dtype=torch.float32)
    heads = wide[:, 3 * 24 : 7 * 24].unflatten(-1, (-1, 24))
    found = rms_norm(heads, None, 1e-6)
    assert found.is_contiguous()
    check_close(found, expected.rms_norm(heads, None, 1e-6))


def test_rms_norm_of_no_rows() -> None:
    assert rms_norm(torch.empty(0, 64), None, 1e-5).shape == (0, 64)


@DTYPES
def test_addition_and_norm_in_one(dtype: torch.dtype) -> None:
    residual, update, weight = randn(3, 200, dtype=dtype), randn(3, 200, dtype=dtype), randn(200, dtype=dtype)
    total, normed = add_rms_norm(residual, update, weight, 1e-5)
    check_close(total, residual.double() + update.double())
    check_close(normed, expected.rms_norm(total, weight, 1e-5))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32), (3, 1500), (2, 3, 1024)])
def test_silu_multiply(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_and_up = randn(*shape[:-1], 2 * shape[-1], dtype=dtype)
    check_close(silu_multiply(gate_and_up), expected.swiglu(*gate_and_up.chunk(2, dim=-1)))
