"""Any sequence of takes, shares, releases and returning plans: no block is lost, none has two owners by accident."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduler.block_pool import BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """The model: who holds what, which step each release waits for, and which steps are in flight."""

    @initialize(num_blocks=st.integers(2, 12))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.ids = set(range(1, num_blocks))
        self.holders: list[list[int]] = []
        self.releases: list[tuple[int, list[int]]] = []
        self.next_step = 0
        self.next_returned = 0

    def used(self) -> Counter[int]:
        used = Counter(block_id for block_ids in self.holders for block_id in block_ids)
        used.update(block_id for _, block_ids in self.releases for block_id in block_ids)
        return used

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        block_ids = self.pool.allocate(data.draw(st.integers(0, self.pool.num_free)))
        assert len(set(block_ids)) == len(block_ids)
        assert set(block_ids) <= self.ids - self.used().keys(), "a block was given away that somebody uses"
        self.holders.append(block_ids)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_ids = list(data.draw(st.sampled_from(self.holders)))
        self.pool.share(block_ids)
        self.holders.append(block_ids)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_ids = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        last_step = data.draw(st.integers(-1, self.next_step - 1))
        self.pool.release(block_ids, last_step)
        if last_step >= self.next_returned:
            self.releases.append((last_step, block_ids))

    @precondition(lambda self: self.next_step - self.next_returned < 4)
    @rule()
    def submit(self) -> None:
        self.next_step += 1

    @precondition(lambda self: self.next_returned < self.next_step)
    @rule()
    def step_returns(self) -> None:
        self.pool.step_returned(self.next_returned)
        self.releases = [(step, ids) for step, ids in self.releases if step > self.next_returned]
        self.next_returned += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "pool"):
            return
        used = self.used()
        assert self.pool.num_free + len(used) == self.pool.num_usable == len(self.ids)
        assert self.pool.num_deferred == sum(len(block_ids) for _, block_ids in self.releases)
        self.pool.check_integrity(block_id for block_ids in self.holders for block_id in block_ids)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for block_ids in self.holders:
            self.pool.release(block_ids, self.next_step - 1)
        self.holders = []
        while self.next_returned < self.next_step:
            self.step_returns()
        assert self.pool.num_free == self.pool.num_usable
        assert set(self.pool.allocate(self.pool.num_free)) == self.ids


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=40)


def test_a_shared_block_waits_for_the_later_of_its_plans() -> None:
    pool = BlockPool(2)
    block_ids = pool.allocate(1)
    pool.share(block_ids)
    pool.release(block_ids, last_step=1)
    pool.release(block_ids, last_step=0)
    pool.step_returned(0)
    assert pool.num_free == 0
    pool.step_returned(1)
    assert pool.num_free == 1
