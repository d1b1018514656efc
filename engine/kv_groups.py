"""Arithmetic of KV groups, shared by leader and ranks: which blocks a position sees, and how many a request needs."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from engine.config import KvGroupConfig


def groups_of_stage(groups: Sequence[KvGroupConfig], layers: range) -> tuple[KvGroupConfig, ...]:
    """The same groups, of their layers only those of a pipeline stage; some may be left with none."""
    return tuple(replace(group, layers=tuple(i for i in group.layers if i in layers)) for group in groups)


def num_layer_slots(groups: Sequence[KvGroupConfig]) -> int:
    """Layers that one block has room for, of a rank whose groups these are."""
    return max(len(group.layers) for group in groups)


def first_visible_block(group: KvGroupConfig, position: int, block_size: int) -> int:
    """Index, in a block table, of the first block that the token at ``position``, or any token after it, can see."""
    return group.first_visible(position) // block_size


def next_release(group: KvGroupConfig, position: int, block_size: int) -> int:
    """The first position after ``position`` that may see fewer of the blocks before it; sys.maxsize: none ever."""
    if group.chunk_size is not None:
        return (position // group.chunk_size + 1) * group.chunk_size
    if group.window_size is not None:
        return (first_visible_block(group, position, block_size) + 1) * block_size + group.window_size - 1
    return sys.maxsize


def max_visible_blocks(group: KvGroupConfig, block_size: int) -> int:
    """Most blocks that one token of a chunked or sliding group sees, however its first position lies in a block."""
    if group.chunk_size is not None:
        worst_offset, num_positions = block_size - gcd(group.chunk_size, block_size), group.chunk_size
    else:
        assert group.window_size is not None, "a token of a full group sees any number of blocks"
        worst_offset, num_positions = block_size - 1, group.window_size
    return -(-(worst_offset + num_positions) // block_size)


def num_blocks_needed(groups: Sequence[KvGroupConfig], num_tokens: int, block_size: int) -> int:
    """Blocks, over all groups, that a request of ``num_tokens`` positions must be able to hold at one time.

    A full group holds every block; another what one token sees, for a longer prefill step can always be cut down to
    that. The number never falls as ``num_tokens`` grows, so a request that fits at its end fits all the way.
    """
    num_full = -(-num_tokens // block_size)
    return sum(num_full if group.is_full else min(num_full, max_visible_blocks(group, block_size)) for group in groups)
