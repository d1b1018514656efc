"""Paged decode attention against float64: lengths around the borders of tiles and parts, chunks, windows, GQA."""

import math

import pytest
import torch

from engine.config import KvGroupConfig
from engine.kernels.triton.decode_attention import decode_attention, num_parts
from tests.kernels.triton import references as expected
from tests.kernels.triton.references import DEVICE, check_close, randn

BLOCK_SIZE = 16
POSITIONS = [0, 1, 15, 16, 63, 64, 130, 200]
FULL = KvGroupConfig((0,))
GROUPS = [FULL, KvGroupConfig((0,), chunk_size=48), KvGroupConfig((0,), window_size=50)]


def attend(
    dtype: torch.dtype, heads: tuple[int, int, int], group: KvGroupConfig, parts: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What the kernel wrote, what it should have written, and into which rows. What nobody sees is NaN."""
    num_heads, num_kv_heads, head_dim = heads
    width = POSITIONS[-1] // BLOCK_SIZE + 1
    num_blocks = 1 + width * len(POSITIONS)
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, math.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    tables = (torch.randperm(num_blocks - 1) + 1).view(len(POSITIONS), width).to(DEVICE)
    num_tokens = len(POSITIONS) + 2
    query = randn(num_tokens, num_heads, head_dim, dtype=dtype)
    output = torch.full_like(query, 7.0)
    rows = torch.randperm(num_tokens)[: len(POSITIONS)].to(DEVICE)
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    positions[rows] = torch.tensor(POSITIONS, device=DEVICE)
    right = torch.full(query.shape, 7.0, dtype=torch.float64, device=DEVICE)
    for request, position in enumerate(POSITIONS):
        seen = torch.arange(group.first_visible(position), position + 1, device=DEVICE)
        blocks, offsets = tables[request, seen // BLOCK_SIZE], seen % BLOCK_SIZE
        keys[blocks, offsets] = randn(len(seen), num_kv_heads, head_dim, dtype=dtype)
        values[blocks, offsets] = randn(len(seen), num_kv_heads, head_dim, dtype=dtype)
        row = int(rows[request])
        right[row] = expected.attention(query[row], keys[blocks, offsets], values[blocks, offsets])
    requests = torch.arange(len(POSITIONS), device=DEVICE)
    decode_attention(
        query,
        output,
        keys,
        values,
        tables,
        positions,
        rows,
        requests,
        chunk_size=group.chunk_size,
        window_size=group.window_size,
        parts=parts,
    )
    return output, right, rows.tolist()


@pytest.mark.parametrize("group", GROUPS, ids=["full", "chunked", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_kind_of_layer(dtype: torch.dtype, group: KvGroupConfig) -> None:
    for parts in (1, 3):
        output, right, _ = attend(dtype, (4, 2, 32), group, parts)
        check_close(output, right)


@pytest.mark.parametrize("heads", [(1, 1, 16), (5, 1, 64), (6, 3, 96), (32, 2, 128)])
def test_every_ratio_of_heads(heads: tuple[int, int, int]) -> None:
    output, right, _ = attend(torch.bfloat16, heads, FULL, 2)
    check_close(output, right)


def test_other_rows_stay_as_they_are() -> None:
    output, _, rows = attend(torch.float32, (2, 1, 16), FULL, 1)
    others = sorted(set(range(len(output))) - set(rows))
    assert (output[others] == 7.0).all()


def test_parts_keep_all_processors_busy_but_are_never_short() -> None:
    assert num_parts(1, 8, 131072, 132) == 64
    assert num_parts(1, 8, 1000, 132) == 4
    assert num_parts(256, 8, 131072, 132) == 1
    assert num_parts(16, 8, 131072, 132) == 5
    assert num_parts(1, 1, 1, 132) == 1
