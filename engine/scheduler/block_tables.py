"""Grows and shrinks the block tables of requests, over all KV groups."""

import sys
from collections.abc import Sequence

from engine.config import KvGroupConfig
from engine.kv_groups import first_visible_block, num_blocks_needed
from engine.messages import NULL_BLOCK
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.request_state import RequestState


class BlockTables:
    """Every position has a block in every group once it is scheduled, so all tables of a request are equally long.

    A chunked group gives back the blocks wholly before the attention chunk of the next position to compute; NULL_BLOCK
    stands in their place.
    """

    def __init__(self, pool: BlockPool, kv_groups: Sequence[KvGroupConfig], block_size: int) -> None:
        self._pool = pool
        self._kv_groups = tuple(kv_groups)
        self._block_size = block_size
        self._chunk_sizes = [(g, group.chunk_size) for g, group in enumerate(kv_groups) if group.chunk_size is not None]

    def open(self, state: RequestState) -> None:
        state.block_tables = [[] for _ in self._kv_groups]
        state.num_unseen_blocks = [0] * len(self._kv_groups)
        state.num_block_tokens = 0
        state.unseen_at = min((size for _, size in self._chunk_sizes), default=sys.maxsize)

    def room(self, state: RequestState) -> int:
        """Positions after ``num_computed`` that its blocks, with all free ones, would hold."""
        num_blocks = self._pool.num_free // len(self._kv_groups)
        return state.num_block_tokens - state.num_computed + num_blocks * self._block_size

    def extend(self, state: RequestState, end: int) -> list[list[int]]:
        """Makes the tables reach ``end`` positions. Returns each group's new blocks (empty: none were needed)."""
        num_new = -(-(end - state.num_block_tokens) // self._block_size)
        if num_new <= 0:
            return []
        new_block_ids = [self._pool.allocate(num_new) for _ in state.block_tables]
        for table, block_ids in zip(state.block_tables, new_block_ids, strict=True):
            table.extend(block_ids)
        state.num_block_tokens += num_new * self._block_size
        return new_block_ids

    def release_unseen(self, state: RequestState, next_position: int) -> None:
        """Gives back what neither ``next_position`` nor any position after it sees."""
        for group, chunk_size in self._chunk_sizes:
            first = first_visible_block(chunk_size, next_position, self._block_size)
            seen_before = state.num_unseen_blocks[group]
            if first > seen_before:
                table = state.block_tables[group]
                self._pool.release(table[seen_before:first], state.last_step)
                table[seen_before:first] = [NULL_BLOCK] * (first - seen_before)
                state.num_unseen_blocks[group] = first
        state.unseen_at = min((next_position // size + 1) * size for _, size in self._chunk_sizes)

    def release_all(self, state: RequestState) -> None:
        for table, num_unseen in zip(state.block_tables, state.num_unseen_blocks, strict=True):
            self._pool.release(table[num_unseen:], state.last_step)
        state.block_tables = []
        state.num_unseen_blocks = []
        state.num_block_tokens = 0

    def num_needed(self, num_tokens: int) -> int:
        """Blocks, over all groups, that a request of this many positions must be able to hold at one time."""
        return num_blocks_needed(self._kv_groups, num_tokens, self._block_size)
