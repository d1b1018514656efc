"""The blocks of a KV cache: who may have one, and when it may be given to somebody else."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from engine.messages import NO_STEP, NULL_BLOCK

BlockKey = tuple[int, bytes]
"""KV group and engine.block_hash: what a block holds."""


class BlockPool:
    """Hands out block ids 1 … num_blocks − 1 (0 is NULL_BLOCK) and counts references to them.

    All KV groups draw from one pool. A released block is *deferred* until the last plan that names it has returned, for
    ranks may still be reading or writing it. Then its reference is dropped; a block without references is free. Whose
    content is known (``keep``) can be found and shared until somebody else gets it; the least recently used go first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # of unknown content
        self._free_kept: dict[int, None] = {}  # of known content; least recently used first
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: defaultdict[int, dict[bytes, int]] = defaultdict(dict)  # by group, then by name
        self._num_references = [0] * max(num_blocks, 1)
        self._deferred: dict[int, list[int]] = {}
        self._num_deferred = 0
        self._last_returned = NO_STEP
        self.num_usable = len(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._free_kept)

    @property
    def num_deferred(self) -> int:
        """References that are dropped as soon as plans in flight return."""
        return self._num_deferred

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks that nobody else holds. The caller has looked at ``num_free``."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks wanted, {self.num_free} free"
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        while len(block_ids) < num_blocks:
            block_ids.append(self._forget_oldest())
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def keep(self, block_id: int, key: BlockKey) -> None:
        """The block, which somebody holds, now has this content to its end, and will not be written again."""
        group, name = key
        if name not in self._block_of[group] and block_id not in self._key_of:
            self._block_of[group][name] = block_id
            self._key_of[block_id] = key

    def find(self, key: BlockKey) -> int | None:
        """A block with this content, in use or free."""
        group, name = key
        return self._block_of[group].get(name)

    def find_each(self, group: int, names: Sequence[bytes]) -> list[int | None]:
        """As ``find``, for one name after the other."""
        return list(map(self._block_of[group].get, names))

    def is_free(self, block_id: int) -> bool:
        return self._num_references[block_id] == 0

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds one reference to each of these blocks, which somebody holds or whose content is known."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._free_kept[block_id]
            self._num_references[block_id] += 1

    def release(self, block_ids: list[int], last_step: int) -> None:
        """Gives up one reference to each block, once ``last_step``, the last plan that names them, has returned."""
        if last_step > self._last_returned:
            self._deferred.setdefault(last_step, []).extend(block_ids)
            self._num_deferred += len(block_ids)
            return
        self._drop(block_ids)

    def step_returned(self, step: int) -> None:
        """Every rank has answered plan ``step``. Plans return in order, so all before it have returned as well."""
        assert step == self._last_returned + 1, f"step {step} returned after step {self._last_returned}"
        self._last_returned = step
        block_ids = self._deferred.pop(step, None)
        if block_ids is not None:
            self._num_deferred -= len(block_ids)
            self._drop(block_ids)

    def withdraw(self, step: int) -> None:
        """No plan ``step`` was made after all: what waits for it waits for the one before."""
        block_ids = self._deferred.pop(step, None)
        if block_ids is not None:
            self._num_deferred -= len(block_ids)
            self.release(block_ids, step - 1)

    def _drop(self, block_ids: list[int]) -> None:
        # Backwards: a prefix can be used without what follows it, and not the other way round.
        for block_id in reversed(block_ids):
            self._num_references[block_id] -= 1
            assert self._num_references[block_id] >= 0, f"block {block_id} was released twice"
            if self._num_references[block_id] == 0:
                if block_id in self._key_of:
                    self._free_kept[block_id] = None
                else:
                    self._free.append(block_id)

    def _forget_oldest(self) -> int:
        block_id = next(iter(self._free_kept))
        del self._free_kept[block_id]
        group, name = self._key_of.pop(block_id)
        del self._block_of[group][name]
        return block_id

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts that ``held`` (ids in all block tables) and the deferred ids are exactly what is not free."""
        expected = Counter(held)
        for block_ids in self._deferred.values():
            expected.update(block_ids)
        assert NULL_BLOCK not in expected, "NULL_BLOCK has an owner"
        free = [*self._free, *self._free_kept]
        assert len(free) == len(set(free)), "a block is free twice"
        assert self._free_kept.keys() <= self._key_of.keys(), "a block is kept whose content is not known"
        contents = {block: (group, name) for group, found in self._block_of.items() for name, block in found.items()}
        assert contents == self._key_of, "contents are mixed up"
        assert len(free) + len(expected) == self.num_usable, (
            f"{len(free)} free and {len(expected)} used blocks of {self.num_usable}"
        )
        for block_id, num_references in enumerate(self._num_references):
            assert num_references == expected[block_id], (
                f"block {block_id} has {num_references} references and {expected[block_id]} owners"
            )
        assert self._num_deferred == sum(map(len, self._deferred.values())), "deferred blocks are miscounted"
        assert all(step > self._last_returned for step in self._deferred), "a step returned without its blocks"
