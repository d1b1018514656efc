"""The reference backend against naive attention: tiles, padded batches, chunks, windows, grouped heads."""

import random

import pytest
import torch

import engine.attention.pieces as pieces
import engine.attention.reference as reference
from engine.attention.backend import KvCacheView
from engine.attention.registry import attention_backend
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.messages import NULL_BLOCK

HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 8, 4, 200
Work = list[tuple[int, int]]
"""(positions before the step, positions in the step) of each request."""


FULL = KvGroupConfig((0,))


def sees(group: KvGroupConfig, position: int, other: int) -> bool:
    if group.chunk_size is not None and other // group.chunk_size != position // group.chunk_size:
        return False
    return other <= position and (group.window_size is None or position - other < group.window_size)


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, group: KvGroupConfig
) -> torch.Tensor:
    """[n, h, d] queries at positions start… over [L, k, d] keys, one query and head at a time, in float64."""
    output = torch.empty_like(query)
    heads_per_kv = query.shape[1] // keys.shape[1]
    for i in range(query.shape[0]):
        position = start + i
        visible = [j for j in range(position + 1) if sees(group, position, j)]
        for head in range(query.shape[1]):
            scores = keys[visible, head // heads_per_kv].double() @ query[i, head].double() / HEAD_DIM**0.5
            output[i, head] = scores.softmax(0) @ values[visible, head // heads_per_kv].double()
    return output


class Pool:
    """A cache of NaN in which the given requests' past is written, block tables in random order."""

    def __init__(self, work: Work, num_kv_heads: int, group: KvGroupConfig, seed: int) -> None:
        self.work, self.group = work, group
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        self.key_cache, self.value_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.key_cache[NULL_BLOCK] = self.value_cache[NULL_BLOCK] = 0
        free = list(range(1, NUM_BLOCKS))
        random.Random(seed).shuffle(free)
        self.keys = [torch.randn(s + n, num_kv_heads, HEAD_DIM, generator=generator) for s, n in work]
        self.values = [torch.randn(s + n, num_kv_heads, HEAD_DIM, generator=generator) for s, n in work]
        self.tables = [[free.pop() for _ in range(-(-(s + n) // BLOCK_SIZE))] for s, n in work]
        for request, (start, _) in enumerate(work):
            for position in range(start):
                block, offset = self.tables[request][position // BLOCK_SIZE], position % BLOCK_SIZE
                self.key_cache[block, offset] = self.keys[request][position]
                self.value_cache[block, offset] = self.values[request][position]
            self._free_invisible(request, start)

    def _free_invisible(self, request: int, start: int) -> None:
        first = next(j for j in range(start + 1) if sees(self.group, start, j))
        for i in range(first // BLOCK_SIZE):
            self.key_cache[self.tables[request][i]] = self.value_cache[self.tables[request][i]] = torch.nan
            self.tables[request][i] = NULL_BLOCK

    def batch(self) -> ForwardBatch:
        width = max(map(len, self.tables))
        table = torch.tensor([row + [NULL_BLOCK] * (width - len(row)) for row in self.tables])
        positions = [torch.arange(s, s + n) for s, n in self.work]
        slots = [table[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in enumerate(positions)]
        empty = torch.empty(0, dtype=torch.int64)
        return ForwardBatch(
            token_ids=empty,
            positions=torch.cat(positions),
            query_lens=tuple(n for _, n in self.work),
            kv_lens=tuple(s + n for s, n in self.work),
            block_tables=(table,),
            slot_mapping=(torch.cat(slots),),
            logits_rows=empty,
        )


WORK: list[Work] = [
    [(0, 1)],
    [(0, 37)],
    [(17, 1), (3, 1), (0, 1), (40, 1), (8, 1)],
    [(5, 11), (30, 1), (0, 9), (15, 1), (23, 2)],
    [(16, 16), (7, 1), (7, 2)],
]


@pytest.mark.parametrize("limits", [(512, 32768), (5, 40)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    "group",
    [
        FULL,
        *(KvGroupConfig((0,), chunk_size=n) for n in (8, 6)),
        *(KvGroupConfig((0,), window_size=n) for n in (1, 8, 7)),
    ],
    ids=["full", "chunk 8", "chunk 6", "window 1", "window 8", "window 7"],
)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("work", WORK, ids=str)
def test_equals_naive_attention(
    monkeypatch: pytest.MonkeyPatch, work: Work, num_kv_heads: int, group: KvGroupConfig, limits: tuple[int, int]
) -> None:
    monkeypatch.setattr(reference, "_MAX_TILE_QUERIES", limits[0])
    monkeypatch.setattr(reference, "_MAX_GATHERED_POSITIONS", limits[1])
    monkeypatch.setattr(pieces, "_MAX_PIECE_POSITIONS", limits[1] // 8)
    pool = Pool(work, num_kv_heads, group, seed=len(work))
    query = torch.randn(sum(n for _, n in work), 4, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    new_keys = torch.cat([keys[start:] for keys, (start, _) in zip(pool.keys, work, strict=True)])
    new_values = torch.cat([values[start:] for values, (start, _) in zip(pool.values, work, strict=True)])
    plan = attention_backend().plan(pool.batch(), (group,), BLOCK_SIZE)
    output = plan.forward(0, query, new_keys, new_values, KvCacheView((pool.key_cache,), (pool.value_cache,)))
    row = 0
    for request, (start, count) in enumerate(work):
        expected = naive(query[row : row + count], pool.keys[request], pool.values[request], start, group)
        torch.testing.assert_close(output[row : row + count], expected, rtol=1e-5, atol=1e-5)
        row += count
    assert pool.key_cache[NULL_BLOCK].eq(0).all()


def test_layers_use_the_slot_of_their_group() -> None:
    """Layer 2 is the first of the second group: its keys go to slot 0, into the second group's blocks."""
    pool = Pool([(0, 3)], 1, FULL, seed=0)
    batch = pool.batch()
    second = torch.tensor([[7]])
    batch = ForwardBatch(
        **{**vars(batch), "block_tables": (*batch.block_tables, second)}
        | {"slot_mapping": (*batch.slot_mapping, 7 * BLOCK_SIZE + torch.arange(3))}
    )
    caches = tuple(torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 1, HEAD_DIM) for _ in range(2))
    plan = attention_backend().plan(batch, (KvGroupConfig((0, 1)), KvGroupConfig((2, 3))), BLOCK_SIZE)
    ones = torch.ones(3, 1, HEAD_DIM)
    plan.forward(2, ones, ones, ones, KvCacheView(caches, caches))
    assert caches[0][7, :3].eq(1).all() and caches[0].sum() == ones.sum() and caches[1].eq(0).all()
    plan.forward(1, ones, ones, ones, KvCacheView(caches, caches))
    assert caches[1][pool.tables[0][0], :3].eq(1).all() and caches[1].sum() == ones.sum()
