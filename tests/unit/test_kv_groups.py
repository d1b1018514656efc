"""The arithmetic of chunked and sliding attention, against counting one position after another."""

import sys

import pytest

from engine.config import KvGroupConfig
from engine.kv_groups import first_visible_block, max_visible_blocks, next_release, num_blocks_needed

FULL = KvGroupConfig((0,))
BLOCK_SIZES = (1, 2, 3, 4, 8, 16)
SIZES = (1, 2, 3, 4, 6, 8, 12)
NARROW = [KvGroupConfig((0,), chunk_size=size) for size in SIZES] + [
    KvGroupConfig((0,), window_size=size) for size in SIZES
]
NUM_POSITIONS = 200


def positions_seen(group: KvGroupConfig, position: int) -> list[int]:
    before = range(position + 1)
    if group.chunk_size is not None:
        return [p for p in before if p // group.chunk_size == position // group.chunk_size]
    if group.window_size is not None:
        return [p for p in before if position - p < group.window_size]
    return list(before)


def blocks_seen(group: KvGroupConfig, position: int, block_size: int) -> set[int]:
    return {p // block_size for p in positions_seen(group, position)}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("group", [FULL, *NARROW], ids=str)
def test_what_is_visible(group: KvGroupConfig, block_size: int) -> None:
    for position in range(60):
        assert group.first_visible(position) == positions_seen(group, position)[0]
        assert first_visible_block(group, position, block_size) == min(blocks_seen(group, position, block_size))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("group", NARROW, ids=str)
def test_max_visible_blocks(group: KvGroupConfig, block_size: int) -> None:
    most = max(len(blocks_seen(group, position, block_size)) for position in range(NUM_POSITIONS))
    assert max_visible_blocks(group, block_size) == most


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("group", NARROW, ids=str)
def test_nothing_is_released_before_the_next_release(group: KvGroupConfig, block_size: int) -> None:
    for position in range(60):
        first = first_visible_block(group, position, block_size)
        changes = [p for p in range(position, NUM_POSITIONS) if first_visible_block(group, p, block_size) > first]
        release = next_release(group, position, block_size)
        assert position < release <= changes[0]
        if group.window_size is not None:
            assert release == changes[0]
    assert next_release(FULL, 7, block_size) == sys.maxsize


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("group", NARROW, ids=str)
def test_num_blocks_needed_never_falls_and_holds_each_single_step(group: KvGroupConfig, block_size: int) -> None:
    needed = [num_blocks_needed((group,), n, block_size) for n in range(1, NUM_POSITIONS)]
    assert needed == sorted(needed)
    for position, enough in enumerate(needed):
        assert len(blocks_seen(group, position, block_size)) <= enough <= position // block_size + 1


def test_num_blocks_needed_adds_the_groups() -> None:
    groups = (FULL, KvGroupConfig((1,), chunk_size=4), KvGroupConfig((2,), chunk_size=6))
    assert num_blocks_needed(groups, 3, 2) == 2 + 2 + 2
    assert num_blocks_needed(groups, 20, 2) == 10 + 2 + 3
    assert num_blocks_needed(groups, 21, 4) == 6 + 1 + 2
    assert num_blocks_needed((FULL, KvGroupConfig((1,), window_size=6)), 20, 2) == 10 + 4


def test_scout_holds_a_quarter_past_its_chunk() -> None:
    # Llama 4 Scout: 12 full and 36 chunked layers of 48, in groups of 12 layers; 8,192 positions a chunk.
    groups = (KvGroupConfig(tuple(range(12))),) + (KvGroupConfig(tuple(range(12)), chunk_size=8192),) * 3
    blocks_at_chunk = num_blocks_needed(groups, 8192, 16)
    assert blocks_at_chunk == 4 * 512
    assert num_blocks_needed(groups, 8192 + 16_000, 16) - blocks_at_chunk == 1000
