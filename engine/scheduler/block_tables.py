"""Grows and shrinks the block tables of requests, over all KV groups."""

import itertools
import sys
from collections.abc import Sequence

from engine.block_hash import extend_hashes
from engine.config import KvGroupConfig
from engine.kv_groups import first_visible_block, next_release, num_blocks_needed
from engine.messages import NULL_BLOCK
from engine.scheduler.block_pool import BlockPool
from engine.scheduler.request_state import RequestState
from engine.scheduler.step_in_flight import StepInFlight

_NAMED_AT_ONCE = 64
_MAX_NAMED = 2048
"""Blocks that are named in one step, some two milliseconds of work, while other requests wait for its plan."""


class BlockTables:
    """Every position has a block in every group once it is scheduled, so all tables of a request are equally long.

    A chunked or sliding group gives back the blocks that neither the next position to compute nor any after it sees;
    NULL_BLOCK stands in their place.
    """

    def __init__(
        self, pool: BlockPool, kv_groups: Sequence[KvGroupConfig], block_size: int, *, keeps_prefixes: bool
    ) -> None:
        self._pool = pool
        self._kv_groups = tuple(kv_groups)
        self._block_size = block_size
        self._narrow_groups = [(g, group) for g, group in enumerate(kv_groups) if not group.is_full]
        self._full_groups_first = sorted(range(len(kv_groups)), key=lambda g: not kv_groups[g].is_full)
        """What is not in a full group need not be looked for in another."""
        self._keeps_prefixes = keeps_prefixes

    def find_prefix(self, state: RequestState, *, all_at_once: bool = True) -> list[list[int]] | None:
        """Tables of blocks that hold the request's first tokens already, in all groups; NULL_BLOCK where a chunked or
        sliding group no longer needs one. At least one token is left to compute.

        Blocks are named as far as they are found, so that a long prompt nobody had before costs nothing here. None: not
        all could be named now (``all_at_once`` is false, and the prompt long); the next call goes on.
        """
        if not self._keeps_prefixes or state.sampling.needs_all_positions:
            return [[] for _ in self._kv_groups]
        num_most = (len(state.token_ids) - 1) // self._block_size
        num_nameable = num_most if all_at_once else min(num_most, len(state.block_hashes) + _MAX_NAMED)
        found: list[list[int]] = []
        for group in self._full_groups_first:
            blocks = self._find_blocks(state, group, num_nameable)
            if len(blocks) == num_nameable < num_most:
                return None
            found.append(blocks)
            num_most = num_nameable = min(num_most, len(blocks))
        found = [found[self._full_groups_first.index(group)] for group in range(len(self._kv_groups))]
        num_blocks = self._longest_held(found)
        end = num_blocks * self._block_size
        firsts = [first_visible_block(group, end, self._block_size) for group in self._kv_groups]
        return [[NULL_BLOCK] * first + blocks[first:num_blocks] for blocks, first in zip(found, firsts, strict=True)]

    def num_cached(self, state: RequestState) -> int:
        """Leading tokens that ``find_prefix`` would find, as far as it looks at once."""
        found = self.find_prefix(state, all_at_once=False)
        return len(found[0]) * self._block_size if found else 0

    def _find_blocks(self, state: RequestState, group: int, num_most: int) -> list[int]:
        """Of a full group the blocks up to the first that is missing; of others all, NULL_BLOCK for those missing."""
        blocks: list[int] = []
        hashes = state.block_hashes
        for first in range(0, num_most, _NAMED_AT_ONCE):
            last = min(first + _NAMED_AT_ONCE, num_most)
            if last > len(hashes):
                extend_hashes(hashes, state.root_hash, state.token_ids, last, self._block_size)
            found = self._pool.find_each(group, hashes[first:last])
            if None in found and self._kv_groups[group].is_full:
                blocks += [block_id for block_id in found[: found.index(None)] if block_id is not None]
                break
            blocks += [NULL_BLOCK if block_id is None else block_id for block_id in found]
        return blocks

    def _longest_held(self, found: list[list[int]]) -> int:
        """The most blocks after which the next position finds all that it sees."""
        runs = [
            # How many blocks are held without a gap before each.
            list(itertools.accumulate(found[index], lambda run, b: 0 if b == NULL_BLOCK else run + 1, initial=0))
            for index, _ in self._narrow_groups
        ]
        for num_blocks in range(min(map(len, found)), 0, -1):
            end = num_blocks * self._block_size
            if all(
                run[num_blocks] >= num_blocks - first_visible_block(group, end, self._block_size)
                for run, (_, group) in zip(runs, self._narrow_groups, strict=True)
            ):
                return num_blocks
        return 0

    def num_to_take(self, num_tokens: int, prefix: list[list[int]]) -> int:
        """Free blocks that a request of this many positions takes, ``prefix`` included, where nobody else uses it."""
        shared = [block_id for table in prefix for block_id in table if block_id != NULL_BLOCK]
        return max(0, self.num_needed(num_tokens) - len(shared)) + sum(map(self._pool.is_free, shared))

    def open(self, state: RequestState, tables: list[list[int]]) -> None:
        """Begins with the blocks that ``find_prefix`` found."""
        state.block_tables = tables
        num_tokens = len(tables[0]) * self._block_size
        state.num_unseen_blocks = [0] * len(self._kv_groups)
        for index, group in self._narrow_groups:
            state.num_unseen_blocks[index] = first_visible_block(group, num_tokens, self._block_size)
        for table, num_unseen in zip(tables, state.num_unseen_blocks, strict=True):
            self._pool.share(table[num_unseen:])
        state.num_computed = state.num_block_tokens = state.num_kept_tokens = num_tokens
        state.unseen_at = self._next_release(num_tokens)

    def keep_filled(self, flight: StepInFlight, failed_slots: set[int]) -> None:
        """What this step computed can be shared from now on. A request that left its slot meanwhile is passed over."""
        for state, slot, end in flight.filled:
            if state.slot == slot and state.entry_step <= flight.step and slot not in failed_slots:
                self.keep(state, end)

    def keep(self, state: RequestState, num_computed: int) -> None:
        """The first ``num_computed`` positions have been computed without error: their full blocks can be shared,
        except those that a chunked or sliding group gave back in the very step that computed them."""
        first, last = state.num_kept_tokens // self._block_size, num_computed // self._block_size
        if not self._keeps_prefixes or last <= first:
            return
        extend_hashes(state.block_hashes, state.root_hash, state.token_ids, last, self._block_size)
        for group, table in enumerate(state.block_tables):
            for index in range(max(first, state.num_unseen_blocks[group]), last):
                self._pool.keep(table[index], (group, state.block_hashes[index]))
        state.num_kept_tokens = last * self._block_size

    def room(self, state: RequestState) -> int:
        """Positions after ``num_computed`` that its blocks, with all free ones, would hold."""
        num_blocks = self._pool.num_free // len(self._kv_groups)
        return state.num_block_tokens - state.num_computed + num_blocks * self._block_size

    def have_room(self, num_tokens: int, num_requests: int) -> bool:
        """Whether free blocks surely hold so many more tokens, however so many requests divide them."""
        return (num_tokens // self._block_size + num_requests) * len(self._kv_groups) <= self._pool.num_free

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
