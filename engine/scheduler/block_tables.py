"""Grows and shrinks the block tables of requests, over all KV groups."""

import sys
from collections.abc import Sequence

from engine.config import KvGroupConfig
from engine.kv_groups import first_visible_block, next_release, num_blocks_needed
from engine.messages import NULL_BLOCK
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.request_state import RequestState


class BlockTables:
    """Every position has a block in every group once it is scheduled, so all tables of a request are equally long.

    A chunked or sliding group gives back the blocks that neither the next position to compute nor any after it sees;
    NULL_BLOCK stands in their place.
    """

    def __init__(self, pool: BlockPool, kv_groups: Sequence[KvGroupConfig], block_size: int) -> None:
        self._pool = pool
        self._kv_groups = tuple(kv_groups)
        self._block_size = block_size
        self._narrow_groups = [(g, group) for g, group in enumerate(kv_groups) if not group.is_full]

    def open(self, state: RequestState) -> None:
        state.block_tables = [[] for _ in self._kv_groups]
        state.num_unseen_blocks = [0] * len(self._kv_groups)
        state.num_block_tokens = 0
        state.unseen_at = self._next_release(0)

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
        for index, group in self._narrow_groups:
            first = first_visible_block(group, next_position, self._block_size)
            seen_before = state.num_unseen_blocks[index]
            if first > seen_before:
                table = state.block_tables[index]
                self._pool.release(table[seen_before:first], state.last_step)
                table[seen_before:first] = [NULL_BLOCK] * (first - seen_before)
                state.num_unseen_blocks[index] = first
        state.unseen_at = self._next_release(next_position)

    def release_all(self, state: RequestState) -> None:
        for table, num_unseen in zip(state.block_tables, state.num_unseen_blocks, strict=True):
            self._pool.release(table[num_unseen:], state.last_step)
        state.block_tables = []
        state.num_unseen_blocks = []
        state.num_block_tokens = 0

    def _next_release(self, position: int) -> int:
        return min(
            (next_release(group, position, self._block_size) for _, group in self._narrow_groups), default=sys.maxsize
        )

    def num_needed(self, num_tokens: int) -> int:
        """Blocks, over all groups, that a request of this many positions must be able to hold at one time."""
        return num_blocks_needed(self._kv_groups, num_tokens, self._block_size)
