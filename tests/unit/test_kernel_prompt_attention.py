"""The native attention of prompts against float64 on random paged caches."""

import math

import pytest
import torch

from engine.config import KvGroupConfig
from engine.kernels.prompt_attention import Prompts, _library, prompt_attention

BLOCK_SIZE = 16
pytestmark = pytest.mark.skipif(_library() is None, reason="needs a CPU with AMX and the native library")

FULL = KvGroupConfig((0,))
PROMPTS = [(0, 2), (0, 17), (5, 33), (63, 1), (0, 130), (127, 3), (100, 160)]
"""Position of the first token, and tokens."""


def expected_output(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, group: KvGroupConfig
) -> torch.Tensor:
    """[n, heads, d] in float64 of queries [n, heads, d] at positions from ``start`` on; keys, values: [L, k, d]."""
    per_kv_head = query.shape[1] // keys.shape[1]
    wide_keys = keys.double().repeat_interleave(per_kv_head, 1)
    wide_values = values.double().repeat_interleave(per_kv_head, 1)
    scores = torch.einsum("nhd,lhd->hnl", query.double(), wide_keys) / math.sqrt(query.shape[2])
    positions = range(start, start + len(query))
    mask = torch.tensor([[group.first_visible(p) <= key <= p for key in range(len(keys))] for p in positions])
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(~mask, -math.inf).softmax(-1), wide_values)


def check(
    group: KvGroupConfig, num_kv_heads: int, per_kv_head: int, head_dim: int, prompts: list[tuple[int, int]]
) -> None:
    """Blocks that nobody sees any more are the null block; what lies in them, and behind the last token, is NaN."""
    num_rows = sum(count for _, count in prompts) + 2
    width = max(start + count for start, count in prompts) // BLOCK_SIZE + 2
    shape = (1 + width * len(prompts), BLOCK_SIZE, num_kv_heads, head_dim)
    keys = torch.full(shape, math.nan, dtype=torch.bfloat16)
    values = keys.clone()
    tables = (torch.randperm(len(keys) - 1) + 1).view(len(prompts), width)
    query = (torch.randn(num_rows, num_kv_heads * per_kv_head, head_dim) * 2).to(torch.bfloat16)
    output = torch.full_like(query, 7.0)
    row, rows, expected = 1, [], []
    for table, (start, count) in zip(tables, prompts, strict=True):
        first, last = group.first_visible(start), start + count
        key, value = (torch.randn(last, num_kv_heads, head_dim).to(torch.bfloat16) for _ in range(2))
        positions = torch.arange(first, last)
        keys[table[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = key[first:]
        values[table[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = value[first:]
        table[: first // BLOCK_SIZE] = 0
        expected.append(expected_output(query[row : row + count], key, value, start, group))
        rows.append(row)
        row += count
    starts, counts = torch.tensor(prompts).t().contiguous()
    runs = Prompts(torch.tensor(rows), torch.arange(len(prompts)), starts, counts)
    prompt_attention(
        query, output, keys, values, tables, runs, chunk_size=group.chunk_size, window_size=group.window_size
    )
    torch.testing.assert_close(output[1:-1].double(), torch.cat(expected), rtol=0.01, atol=0.02)
    assert (output[0] == 7.0).all() and (output[-1] == 7.0).all(), "only the prompts' rows are written"


@pytest.mark.parametrize(
    ("num_kv_heads", "per_kv_head", "head_dim"), [(1, 1, 32), (2, 4, 64), (1, 16, 128), (3, 5, 96), (2, 7, 256)]
)
def test_equals_float64(num_kv_heads: int, per_kv_head: int, head_dim: int) -> None:
    check(FULL, num_kv_heads, per_kv_head, head_dim, PROMPTS)


@pytest.mark.parametrize("window_size", [1, 7, 16, 100, 129, 1000])
def test_windows(window_size: int) -> None:
    check(KvGroupConfig((0,), window_size=window_size), 2, 3, 64, PROMPTS)


@pytest.mark.parametrize("chunk_size", [8, 24, 64, 128, 1000])
def test_chunks(chunk_size: int) -> None:
    check(KvGroupConfig((0,), chunk_size=chunk_size), 2, 4, 64, PROMPTS)


def test_more_columns_than_are_computed_together() -> None:
    check(KvGroupConfig((0,), window_size=300), 1, 4, 64, [(200, 400), (0, 129)])


def test_scores_far_apart_stay_exact() -> None:
    """A maximum that rises by hundreds from chunk to chunk leaves only the last position's value."""
    keys = torch.zeros(32, BLOCK_SIZE, 1, 32, dtype=torch.bfloat16)
    keys[..., 0] = torch.arange(32 * BLOCK_SIZE).view(32, BLOCK_SIZE, 1) // 2 * 2
    values = torch.randn(32, BLOCK_SIZE, 1, 32).to(torch.bfloat16)
    query = torch.zeros(512, 1, 32, dtype=torch.bfloat16)
    query[..., 0] = 100.0
    output = torch.empty_like(query)
    zero = torch.zeros(1, dtype=torch.int64)
    runs = Prompts(zero, zero, zero, torch.tensor([512]))
    prompt_attention(query, output, keys, values, torch.arange(32)[None], runs, chunk_size=None, window_size=None)
    expected = expected_output(query, keys.flatten(0, 1), values.flatten(0, 1), 0, FULL)
    torch.testing.assert_close(output.double(), expected, rtol=0.01, atol=0.01)
