"""The arithmetic of chunked attention, against counting one position after another."""

import pytest

from engine.config import KvGroupConfig
from engine.kv_groups import first_visible_block, max_blocks_of_chunk, num_blocks_needed

SIZES = [(chunk, block) for chunk in (1, 2, 3, 4, 6, 8, 12) for block in (1, 2, 3, 4, 8, 16)]


def blocks_seen(chunk_size: int, block_size: int, position: int) -> set[int]:
    chunk = position // chunk_size
    return {p // block_size for p in range(position + 1) if p // chunk_size == chunk}


@pytest.mark.parametrize(("chunk_size", "block_size"), SIZES)
def test_first_visible_block(chunk_size: int, block_size: int) -> None:
    for position in range(60):
        assert first_visible_block(chunk_size, position, block_size) == min(
            blocks_seen(chunk_size, block_size, position)
        )
        assert first_visible_block(None, position, block_size) == 0


@pytest.mark.parametrize(("chunk_size", "block_size"), SIZES)
def test_max_blocks_of_chunk(chunk_size: int, block_size: int) -> None:
    last_of_chunk = range(chunk_size - 1, chunk_size * block_size * 2, chunk_size)
    most = max(len(blocks_seen(chunk_size, block_size, position)) for position in last_of_chunk)
    assert max_blocks_of_chunk(chunk_size, block_size) == most


def test_num_blocks_needed_adds_the_groups() -> None:
    groups = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=4), KvGroupConfig((2,), chunk_size=6))
    assert num_blocks_needed(groups, 3, 2) == 2 + 2 + 2
    assert num_blocks_needed(groups, 20, 2) == 10 + 2 + 3
    assert num_blocks_needed(groups, 21, 4) == 6 + 1 + 2


def test_scout_holds_a_quarter_past_its_chunk() -> None:
    # Llama 4 Scout: 12 full and 36 chunked layers of 48, in groups of 12 layers; 8,192 positions a chunk.
    groups = (KvGroupConfig(tuple(range(12))),) + (KvGroupConfig(tuple(range(12)), chunk_size=8192),) * 3
    blocks_at_chunk = num_blocks_needed(groups, 8192, 16)
    assert blocks_at_chunk == 4 * 512
    assert num_blocks_needed(groups, 8192 + 16_000, 16) - blocks_at_chunk == 1000
