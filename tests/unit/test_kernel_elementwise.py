"""The one-pass kernels between matrix products, against float64."""

import pytest
import torch
from torch.nn import functional

from engine.kernels.elementwise import _library, add_rms_norm, rms_norm, rotate_halves, silu_multiply

needs_library = pytest.mark.skipif(_library() is None, reason="needs a CPU with AMX and the native library")
ROUNDED_TWICE = 2**-7
"""Relative: two roundings to bfloat16."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


@needs_library
@pytest.mark.parametrize("shape", [(1, 16), (7, 64), (3, 2, 48), (2, 2048)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm(shape: tuple[int, ...], has_weight: bool) -> None:
    hidden, weight = random(*shape) * 3, random(shape[-1])
    expected = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    if has_weight:
        expected = expected * weight.double()
    output = rms_norm(hidden, weight if has_weight else None, 1e-5)
    assert output is not None
    torch.testing.assert_close(output.double(), expected, rtol=ROUNDED_TWICE, atol=1e-6)


@needs_library
@pytest.mark.parametrize("shape", [(1, 16), (7, 64), (2, 2048)])
def test_add_rms_norm(shape: tuple[int, int]) -> None:
    """As the addition and the norm, one after another."""
    hidden, update, weight = random(*shape), random(*shape), random(shape[-1])
    total = hidden + update
    expected = rms_norm(total, weight, 1e-5)
    both = add_rms_norm(hidden, update, weight, 1e-5)
    assert both is not None and expected is not None
    assert torch.equal(both[0], total) and torch.equal(both[1], expected)


@needs_library
def test_silu_multiply() -> None:
    gates = torch.linspace(-200, 200, 512)
    gates[:2] = torch.tensor([-3e38, -1e30])
    both = torch.cat((gates.to(torch.bfloat16), random(512)))[None].repeat(3, 1)
    gate, up = both.double().chunk(2, dim=-1)
    output = silu_multiply(both)
    assert output is not None
    torch.testing.assert_close(output.double(), functional.silu(gate) * up, rtol=ROUNDED_TWICE, atol=1e-6)


@needs_library
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 32), (4, 64), (3, 128), (2, 96)])
def test_rotate_halves_of_a_part_of_wider_rows(num_heads: int, head_dim: int) -> None:
    wide = random(5, num_heads * head_dim + 64)
    heads = wide[:, 32 : 32 + num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    angles = torch.randn(5, 1, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    output = rotate_halves(heads, cos, sin)
    assert output is not None
    first, second = heads.double().chunk(2, dim=-1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)


def test_what_the_kernels_do_not_take() -> None:
    assert rms_norm(torch.ones(2, 16), None, 1e-5) is None
    assert rms_norm(random(2, 24), None, 1e-5) is None
    assert silu_multiply(random(2, 40)) is None
    assert add_rms_norm(random(2, 24), random(2, 24), random(24), 1e-5) is None
    assert add_rms_norm(random(4, 16)[:, :16].t().contiguous().t(), random(4, 16), random(16), 1e-5) is None
    assert rotate_halves(random(2, 1, 48), torch.ones(2, 1, 24), torch.ones(2, 1, 24)) is None
    assert rms_norm(random(0, 16), None, 1e-5) is None
