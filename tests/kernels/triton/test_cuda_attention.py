"""Steps of the CUDA backend, prompts and decoding requests mixed, against float64 token by token."""

from dataclasses import dataclass

import pytest
import torch

from engine.attention import cuda_prefill
from engine.attention.backend import KvCacheView
from engine.attention.cuda import CudaAttention
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.layers.rotary import Rotation
from tests.kernels.triton import references as expected
from tests.kernels.triton.references import DEVICE, check_close, randn

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 4, 2, 16
GROUPS = [
    KvGroupConfig((0,)),
    KvGroupConfig((0,), chunk_size=8),
    KvGroupConfig((0,), window_size=7),
    KvGroupConfig((0,), window_size=100),
]
WORK = [[(0, 9)], [(5, 1), (0, 1)], [(3, 11), (20, 1), (0, 9), (15, 1), (23, 2)]]
"""Of each request: tokens before the step, and in it."""


@dataclass
class Step:
    batch: ForwardBatch
    cache: KvCacheView
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def make_step(work: list[tuple[int, int]], dtype: torch.dtype) -> Step:
    ends = [start + count for start, count in work]
    width = max(-(-end // BLOCK_SIZE) for end in ends)
    num_blocks = 1 + width * len(work)
    tables = (torch.randperm(num_blocks - 1) + 1).view(len(work), width).to(DEVICE)
    positions = [torch.arange(start, start + count, device=DEVICE) for start, count in work]
    slots = [tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in enumerate(positions)]
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    batch = ForwardBatch(
        token_ids=empty,
        positions=torch.cat(positions),
        query_lens=tuple(count for _, count in work),
        kv_lens=tuple(ends),
        block_tables=(tables,),
        slot_mapping=(torch.cat(slots),),
        logits_rows=empty,
    )
    num_tokens = len(batch.positions)
    shape = (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = KvCacheView((randn(*shape, dtype=dtype),), (randn(*shape, dtype=dtype),))
    query = randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)
    key, value = (randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    return Step(batch, cache, query, key, value)


def right(step: Step, group: KvGroupConfig) -> torch.Tensor:
    """From the cache as it is after the step, and queries as they are."""
    keys, values = step.cache.key_cache[0], step.cache.value_cache[0]
    rows, row = [], 0
    for request, (count, end) in enumerate(zip(step.batch.query_lens, step.batch.kv_lens, strict=True)):
        for position in range(end - count, end):
            seen = torch.arange(group.first_visible(position), position + 1, device=DEVICE)
            blocks = step.batch.block_tables[0][request, seen // BLOCK_SIZE]
            rows.append(
                expected.attention(step.query[row], keys[blocks, seen % BLOCK_SIZE], values[blocks, seen % BLOCK_SIZE])
            )
            row += 1
    return torch.stack(rows)


@pytest.mark.parametrize("tile", [512, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS, ids=["full", "chunked", "sliding", "wide"])
@pytest.mark.parametrize("work", WORK, ids=str)
def test_a_step(
    monkeypatch: pytest.MonkeyPatch, work: list[tuple[int, int]], group: KvGroupConfig, dtype: torch.dtype, tile: int
) -> None:
    monkeypatch.setattr(cuda_prefill, "_TILE_QUERIES", tile)
    step = make_step(work, dtype)
    planned = CudaAttention().plan(step.batch, (group,), BLOCK_SIZE)
    found = planned.forward(0, step.query, step.key, step.value, step.cache)
    written = step.cache.key_cache[0].flatten(0, 1)[step.batch.slot_mapping[0]]
    assert torch.equal(written, step.key)
    check_close(found, right(step, group))


def test_a_step_that_turns_its_keys_itself() -> None:
    step = make_step(WORK[2], torch.float32)
    turns = torch.rand(len(step.query), 1, HEAD_DIM // 2, device=DEVICE) * 10
    rotation = Rotation(turns.cos(), turns.sin(), interleaved=False)
    planned = CudaAttention().plan(step.batch, GROUPS[:1], BLOCK_SIZE)
    found = planned.forward(0, step.query, step.key, step.value, step.cache, rotation)
    step.query = expected.rotated(step.query, turns.cos(), turns.sin(), False)
    written = step.cache.key_cache[0].flatten(0, 1)[step.batch.slot_mapping[0]]
    check_close(written, expected.rotated(step.key, turns.cos(), turns.sin(), False))
    check_close(found, right(step, GROUPS[0]))
