"""The native products, against float64 and beside oneDNN, which shares the tile units."""

import pytest
import torch
from torch.nn import functional

from engine.kernels.linear import _tile_library, can_multiply_int8, linear, linear_int8

needs_tiles = pytest.mark.skipif(_tile_library() is None, reason="needs a CPU with AMX and the native library")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def matrices(num_tokens: int, num_inputs: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and weights, and their product in float64."""
    hidden = torch.randn(num_tokens, num_inputs).to(torch.bfloat16)
    weight = torch.randn(num_outputs, num_inputs).to(torch.bfloat16)
    return hidden, weight, hidden.double() @ weight.double().t()


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 32, 33, 48, 49, 127, 128, 129, 256, 300])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(32, 32), (64, 96), (256, 32), (1024, 160), (40, 72)])
def test_equals_float64_rounded_once(num_tokens: int, num_inputs: int, num_outputs: int) -> None:
    hidden, weight, expected = matrices(num_tokens, num_inputs, num_outputs)
    # One rounding to bfloat16 (2⁻⁹ of the value) of sums in float32 (whose error grows with the sum of magnitudes).
    magnitudes = hidden.double().abs() @ weight.double().abs().t()
    bound = expected.abs() * 2**-8 + magnitudes * 2**-20
    assert ((linear(hidden, weight).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("num_tokens", [255, 257, 511, 512, 513])
def test_many_tokens_are_packed_block_by_block(num_tokens: int) -> None:
    """A block of packed tokens has 1 MiB: 256 of these."""
    hidden, weight, expected = matrices(num_tokens, 2048, 96)
    magnitudes = hidden.double().abs() @ weight.double().abs().t()
    bound = expected.abs() * 2**-8 + magnitudes * 2**-20
    assert ((linear(hidden, weight).double() - expected).abs() <= bound).all()


@needs_tiles
@pytest.mark.parametrize(("num_tokens", "num_inputs"), [(100, 512), (500, 2048)])
def test_a_token_does_not_depend_on_the_others(num_tokens: int, num_inputs: int) -> None:
    hidden, weight, _ = matrices(num_tokens, num_inputs, 256)
    codes, scales = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(256)
    together, int8_together = linear(hidden, weight), linear_int8(hidden, codes, scales)
    for i in (0, 1, 40, 99, num_tokens - 1):
        alone = hidden[i : i + 1]
        assert torch.equal(linear(alone, weight)[0], together[i])
        assert torch.equal(linear_int8(alone, codes, scales)[0], int8_together[i])


def test_tokens_that_are_not_contiguous() -> None:
    hidden, weight, _ = matrices(70, 256, 64)
    wide = torch.cat([hidden, hidden], dim=1)
    assert torch.equal(linear(wide[:, :256], weight), linear(hidden, weight))
    assert torch.equal(linear(hidden.repeat_interleave(2, 0)[::2], weight), linear(hidden, weight))


@needs_tiles
def test_onednn_keeps_its_tiles() -> None:
    """Both set up the tile units for themselves; neither may find the other's set-up."""
    small, large = matrices(3, 128, 64), matrices(512, 1024, 512)
    ours, theirs = linear(*small[:2]), functional.linear(*large[:2])
    for _ in range(20):
        assert torch.equal(linear(*small[:2]), ours)
        assert torch.equal(functional.linear(*large[:2]), theirs)


def test_what_the_kernel_does_not_take_is_torchs() -> None:
    hidden, weight, expected = matrices(4, 64, 64)
    torch.testing.assert_close(linear(hidden.float(), weight.float()).double(), expected, rtol=1e-5, atol=1e-4)
    strided = weight.t().contiguous().t()
    assert torch.equal(linear(hidden, strided), functional.linear(hidden, strided))
    assert linear(hidden[:0], weight).shape == (0, 64)
    assert linear(hidden.view(2, 2, 64), weight).shape == (2, 2, 64)


@needs_tiles
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 32, 33, 200, 601])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 32), (192, 96), (2048, 64)])
def test_int8_sums_are_exact(num_tokens: int, num_inputs: int, num_outputs: int) -> None:
    """Tokens are rounded to int8 by their largest magnitude; after that only the result is rounded."""
    hidden = (torch.randn(num_tokens, num_inputs) * 10 ** torch.randn(num_tokens, 1)).to(torch.bfloat16)
    hidden[-1] = 0
    weight = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8)
    scales = torch.rand(num_outputs)
    peaks = hidden.float().abs().amax(-1, keepdim=True)
    rounded = (hidden.float() * torch.where(peaks > 0, torch.full_like(peaks, 127) / peaks, 0)).round()
    expected = (rounded.double() @ weight.double().t()) * (peaks / 127) * scales
    assert can_multiply_int8(weight, torch.bfloat16)
    error = (linear_int8(hidden, weight, scales).double() - expected).abs()
    assert (error <= expected.abs() * 2**-8).all()


@needs_tiles
def test_int8_of_the_smallest_and_largest_numbers() -> None:
    """Their scales, or what the tokens are multiplied by, are at the ends of float32."""
    weight, scales = torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
    for value in (torch.finfo(torch.bfloat16).max / 128, 2.0**-120):
        output = linear_int8(torch.full((2, 64), value, dtype=torch.bfloat16), weight, scales)
        torch.testing.assert_close(output.double() / value, torch.full((2, 32), 64.0).double(), rtol=2**-7, atol=0)
    for value in (2.0**-126, 2.0**-133):
        tiny = torch.tensor([value, 0.0] * 32, dtype=torch.bfloat16)[None]
        assert linear_int8(tiny, weight, scales).abs().max() <= 64 * value
    assert linear_int8(torch.empty(0, 64, dtype=torch.bfloat16), weight, scales).shape == (0, 32)


@needs_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_int8_does_not_hide_what_is_not_finite(value: float) -> None:
    hidden = torch.randn(5, 128).to(torch.bfloat16)
    weight, scales = torch.randint(-128, 128, (32, 128), dtype=torch.int8), torch.rand(32)
    expected = linear_int8(hidden, weight, scales)
    for place in (0, 77, 127):
        broken = hidden.clone()
        broken[2, place] = value
        output = linear_int8(broken, weight, scales)
        assert output[2].isnan().all()
        assert torch.equal(output[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_int8_shapes_that_the_kernel_does_not_take() -> None:
    assert not can_multiply_int8(torch.zeros(32, 96, dtype=torch.int8), torch.bfloat16)
    assert not can_multiply_int8(torch.zeros(40, 64, dtype=torch.int8), torch.bfloat16)
    assert not can_multiply_int8(torch.zeros(32, 64, dtype=torch.int8), torch.float32)
