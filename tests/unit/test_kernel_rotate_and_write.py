"""Turning queries and keys and writing the cache in one call, against torch's operations one by one."""

import pytest
import torch

from engine.kernels.rotate_and_write import _library, rotate_and_write

needs_library = pytest.mark.skipif(_library() is None, reason="needs a CPU with AMX and the native library")


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In float64."""
    first, second = heads.double().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@needs_library
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 32), (8, 2, 64), (15, 3, 96), (4, 4, 256)])
@pytest.mark.parametrize("turns", [True, False])
def test_equals_torch(num_heads: int, num_kv_heads: int, head_dim: int, turns: bool) -> None:
    sizes = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    product = torch.randn(5, sum(sizes)).to(torch.bfloat16)
    query, key, value = (part.unflatten(1, (-1, head_dim)) for part in product.split(sizes, dim=1))
    caches = [torch.full((4, 16, num_kv_heads, head_dim), 7.0, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([17, 3, 63, 30, 18])
    angles = torch.randn(5, 1, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    output = rotate_and_write(query, key, value, caches[0], caches[1], slots, (cos, sin) if turns else None)
    assert output is not None and output.is_contiguous()
    expected_query, expected_key = (turned(x, cos, sin) if turns else x.double() for x in (query, key))
    torch.testing.assert_close(output.double(), expected_query, rtol=2**-8, atol=1e-5)
    written = [cache.flatten(0, 1)[slots] for cache in caches]
    torch.testing.assert_close(written[0].double(), expected_key, rtol=2**-8, atol=1e-5)
    assert torch.equal(written[1], value)
    others = [slot for slot in range(64) if slot not in slots.tolist()]
    assert all((cache.flatten(0, 1)[others] == 7.0).all() for cache in caches), "only the slots are written"


def test_what_the_kernel_does_not_take() -> None:
    query, cache, slots = torch.ones(1, 1, 48), torch.zeros(1, 16, 1, 48), torch.zeros(1, dtype=torch.int64)
    assert rotate_and_write(query, query, query, cache, cache, slots, None) is None
    narrow = [tensor.to(torch.bfloat16) for tensor in (query, cache)]
    assert rotate_and_write(narrow[0], narrow[0], narrow[0], narrow[1], narrow[1], slots, None) is None
    assert not cache.any()
