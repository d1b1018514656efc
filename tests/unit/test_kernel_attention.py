"""The native decode attention against float64 on random paged caches."""

import math

import pytest
import torch

from engine.kernels.decode_attention import DecodeRequests, _library, can_attend, decode_attention

BLOCK_SIZE = 16
pytestmark = pytest.mark.skipif(_library() is None, reason="needs a CPU with AMX and the native library")


def expected_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: list[int], first: int, last: int
) -> torch.Tensor:
    """[heads, d] in float64 of one token's queries [heads, d]."""
    positions = torch.arange(first, last)
    blocks = torch.tensor(table)[positions // BLOCK_SIZE]
    seen_keys = keys[blocks, positions % BLOCK_SIZE].double()
    seen_values = values[blocks, positions % BLOCK_SIZE].double()
    heads_per_kv_head = query.shape[0] // keys.shape[2]
    outputs = []
    for head in range(query.shape[0]):
        scores = seen_keys[:, head // heads_per_kv_head] @ query[head].double() / math.sqrt(query.shape[1])
        outputs.append(scores.softmax(0) @ seen_values[:, head // heads_per_kv_head])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("num_kv_heads", "heads_per_kv_head", "head_dim"), [(1, 1, 32), (2, 4, 64), (1, 16, 128), (3, 5, 96), (2, 8, 256)]
)
def test_equals_float64(num_kv_heads: int, heads_per_kv_head: int, head_dim: int) -> None:
    """Of every length around the borders of blocks and chunks; what is not seen is NaN."""
    seen = [(0, 1), (0, 15), (0, 16), (0, 17), (3, 4), (5, 40), (16, 33), (31, 64), (0, 511), (0, 513), (500, 1537)]
    num_heads = num_kv_heads * heads_per_kv_head
    width = 100
    num_blocks = 1 + width * len(seen)
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    keys = torch.full(shape, math.nan, dtype=torch.bfloat16)
    values = keys.clone()
    tables = (torch.randperm(num_blocks - 1) + 1).view(len(seen), width)
    for table, (first, last) in zip(tables, seen, strict=True):
        positions = torch.arange(first, last)
        blocks, offsets = table[positions // BLOCK_SIZE], positions % BLOCK_SIZE
        keys[blocks, offsets] = torch.randn(len(positions), num_kv_heads, head_dim).to(torch.bfloat16)
        values[blocks, offsets] = torch.randn(len(positions), num_kv_heads, head_dim).to(torch.bfloat16)
    query = (torch.randn(len(seen) + 2, num_heads, head_dim) * 2).to(torch.bfloat16)
    output = torch.full_like(query, 7.0)
    rows = torch.randperm(len(seen) + 2)[: len(seen)]
    firsts, lasts = torch.tensor(seen).t().contiguous()
    assert can_attend(query, keys)
    decode_attention(query, output, keys, values, tables, DecodeRequests(rows, torch.arange(len(seen)), firsts, lasts))
    for i, (first, last) in enumerate(seen):
        expected = expected_rows(query[rows[i]], keys, values, tables[i].tolist(), first, last)
        torch.testing.assert_close(output[rows[i]].double(), expected, rtol=0.01, atol=0.02)
    others = sorted(set(range(len(query))) - set(rows.tolist()))
    assert (output[others] == 7.0).all(), "only the requests' rows are written"


def test_what_the_kernel_does_not_take() -> None:
    cache = torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
    query = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    assert can_attend(query, cache)
    assert not can_attend(query.float(), cache)
    assert not can_attend(query, torch.zeros(2, 8, 2, 64, dtype=torch.bfloat16))
    assert not can_attend(torch.zeros(1, 8, 48, dtype=torch.bfloat16), torch.zeros(2, 16, 2, 48, dtype=torch.bfloat16))
    assert not can_attend(torch.zeros(1, 34, 64, dtype=torch.bfloat16), cache)
