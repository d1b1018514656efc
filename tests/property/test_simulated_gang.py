"""The watchers are watched: the simulated gang catches a leader that breaks the rules on reuse."""

import pytest

from cluster.simulate.gang import SimulatedGang
from engine.config import KvGroupConfig
from engine.messages import BatchPlan, NewRequest, ScheduledRequest, StepPlan
from engine.request import SamplingParams


def new_gang(kv_groups: tuple[KvGroupConfig, ...] = (KvGroupConfig((0,)),)) -> SimulatedGang:
    return SimulatedGang(num_slots=2, kv_groups=kv_groups, block_size=2, num_blocks=9, vocab_size=9, depth=2)


def prefill(step: int, slot: int, block_ids: list[list[int]], num_tokens: int = 4) -> StepPlan:
    new = NewRequest(slot, [slot + 1] * num_tokens, num_tokens, SamplingParams(4, seed=slot))
    share = ScheduledRequest(slot, 0, num_tokens, [], block_ids, sample=True)
    return StepPlan(0, step, [BatchPlan([], [new], [share])])


def decode(step: int, slot: int, start: int, block_ids: list[list[int]], input_step: int) -> StepPlan:
    return StepPlan(0, step, [BatchPlan([], [], [ScheduledRequest(slot, start, 1, [], block_ids, True, input_step)])])


def test_a_block_given_away_while_a_plan_in_flight_names_it() -> None:
    gang = new_gang()
    gang.submit(prefill(0, 0, [[1, 2]]))
    with pytest.raises(AssertionError, match=r"step 1 gives out \{2\}, which step 0 still names"):
        gang.submit(prefill(1, 1, [[2, 3]]))


def test_a_block_given_away_while_its_owner_still_needs_it() -> None:
    gang = new_gang()
    gang.submit(prefill(0, 0, [[1, 2]])).result()
    gang.submit(prefill(1, 1, [[2, 3]])).result()
    with pytest.raises(AssertionError, match="block 2, offset 0"):
        gang.submit(decode(2, 0, 4, [[4]], input_step=0))


def test_a_block_given_away_while_a_window_still_sees_it() -> None:
    """Positions 2 to 4 are visible from position 4; the block of the first two is behind the window."""
    gang = new_gang((KvGroupConfig((0,), window_size=3),))
    gang.submit(prefill(0, 0, [[1, 2]])).result()
    gang.submit(prefill(1, 1, [[1, 3]])).result()
    gang.submit(decode(2, 0, 4, [[4]], input_step=0)).result()
    gang = new_gang((KvGroupConfig((0,), window_size=4),))
    gang.submit(prefill(0, 0, [[1, 2]])).result()
    gang.submit(prefill(1, 1, [[1, 3]])).result()
    with pytest.raises(AssertionError, match="block 1, offset 1"):
        gang.submit(decode(2, 0, 4, [[4]], input_step=0))


def test_a_memory_that_changes_before_a_plan_returns() -> None:
    gang = new_gang()
    gang._check_reuse = lambda plan: None  # type: ignore[method-assign]
    first = gang.submit(prefill(0, 0, [[1, 2]]))
    gang.submit(prefill(1, 1, [[2, 3]]))
    with pytest.raises(AssertionError, match="block 2, offset 0"):
        first.result()


def test_a_table_of_one_group_that_points_into_another() -> None:
    gang = new_gang((KvGroupConfig((0,)), KvGroupConfig((1,))))
    with pytest.raises(AssertionError, match="block 2, offset 0"):
        gang.submit(prefill(0, 0, [[1, 2], [2, 3]]))


def test_more_plans_than_the_depth() -> None:
    gang = new_gang()
    gang.submit(prefill(0, 0, [[1, 2]]))
    gang.submit(prefill(1, 1, [[3, 4]]))
    with pytest.raises(AssertionError, match="more than 2 plans"):
        gang.submit(decode(2, 0, 4, [[5]], input_step=0))
