"""Arithmetic of KV groups, shared by leader and ranks: which blocks a position sees, and how many a request needs."""

from collections.abc import Sequence
from math import gcd

from engine.config import KvGroupConfig


def first_visible_block(chunk_size: int | None, position: int, block_size: int) -> int:
    """Index, in a block table, of the first block that the token at ``position``, or any token after it, can see."""
    if chunk_size is None:
        return 0
    return position // chunk_size * chunk_size // block_size


def max_blocks_of_chunk(chunk_size: int, block_size: int) -> int:
    """Most blocks that one attention chunk touches, however its start lies within a block."""
    worst_offset = block_size - gcd(chunk_size, block_size)
    return -(-(worst_offset + chunk_size) // block_size)


def num_blocks_needed(groups: Sequence[KvGroupConfig], num_tokens: int, block_size: int) -> int:
    """Blocks, over all groups, that a request of ``num_tokens`` positions must be able to hold at one time.

    A full group holds every block; a chunked group holds one attention chunk's, for a longer prefill step can always
    be cut down to it. The number never falls as ``num_tokens`` grows, so one that fits at its end fits all the way.
    """
    num_full = -(-num_tokens // block_size)
    return sum(
        num_full if group.chunk_size is None else min(num_full, max_blocks_of_chunk(group.chunk_size, block_size))
        for group in groups
    )
