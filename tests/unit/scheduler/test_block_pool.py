"""Blocks of plans that were not made after all."""

from engine.scheduler.block_pool import BlockPool


def test_what_waits_for_a_withdrawn_plan_waits_for_the_one_before() -> None:
    pool = BlockPool(8)
    block_ids = pool.allocate(2)
    num_free = pool.num_free
    pool.step_returned(0)
    pool.release(block_ids, 3)
    pool.withdraw(3)
    pool.step_returned(1)
    assert pool.num_free == num_free, "plan 2 may still read them"
    pool.step_returned(2)
    assert pool.num_free == num_free + 2
