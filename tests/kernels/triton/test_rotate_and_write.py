"""Rotation and the write to the paged cache against complex numbers in float64."""

import pytest
import torch

from engine.kernels.triton.rotate_and_write import Angles, rotate, rotate_and_write
from tests.kernels.triton import references as expected
from tests.kernels.triton.references import DEVICE, check_close, randn

BLOCK_SIZE = 4


def angles(num_tokens: int, head_dim: int, interleaved: bool) -> Angles:
    turns = torch.rand(num_tokens, 1, head_dim // 2, device=DEVICE) * 100
    return Angles(turns.cos(), turns.sin(), interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 16), (5, 1, 64), (40, 8, 128), (6, 3, 96)])
@pytest.mark.parametrize("kind", ["halves", "pairs", "none"])
def test_rotates_and_writes(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, kind: str) -> None:
    num_tokens, num_blocks = 3, 5
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    query, key, value = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split(sizes, dim=-1))
    key_cache = torch.zeros(num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
    value_cache = torch.zeros_like(key_cache)
    slots = torch.tensor([7, -1, 18], device=DEVICE)
    turn = None if kind == "none" else angles(num_tokens, head_dim, kind == "pairs")

    found = rotate_and_write(query, key, value, key_cache, value_cache, slots, turn)

    new_key = key.double()
    new_query = query.double()
    if turn is not None:
        new_query = expected.rotated(query, turn.cos, turn.sin, turn.interleaved)
        new_key = expected.rotated(key, turn.cos, turn.sin, turn.interleaved)
    check_close(found, new_query)
    if turn is not None:
        assert torch.equal(rotate(query, turn), found)
    for token, slot in ((0, 7), (2, 18)):
        check_close(key_cache.flatten(0, 1)[slot], new_key[token])
        assert torch.equal(value_cache.flatten(0, 1)[slot], value[token])
    others = [slot for slot in range(num_blocks * BLOCK_SIZE) if slot not in (7, 18)]
    assert not key_cache.flatten(0, 1)[others].any() and not value_cache.flatten(0, 1)[others].any()
