"""Requests in lockstep: who is, what plans say of them, and that their counters are right whenever they leave."""

import pytest

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import NO_STEP, BatchPlan, SampledToken, StepResult
from engine.packed import pack, unpack
from engine.request import FinishReason, Output, Request, SamplingParams
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler

BLOCK_SIZE = 8
PROMPT = [1, 2, 3]
STOP = 9
FULL = (KvGroupConfig((0,)),)


class Bed:
    """Two plans are always in flight; every answer is token 7 unless told otherwise."""

    def __init__(self, num_blocks: int = 100, depth: int = 2, keeps_prefixes: bool = False) -> None:
        self.scheduler = Scheduler(SchedulerConfig(4, 64), CacheConfig(BLOCK_SIZE, num_blocks, keeps_prefixes), FULL)
        self.depth = depth
        self.plans: list[BatchPlan] = []
        self.num_returned = 0
        self.num_added = 0

    def add(self, max_tokens: int = 60) -> RequestState:
        sampling = SamplingParams(max_tokens, stop_token_ids=(STOP,))
        request = Request(f"r{self.num_added}", PROMPT, len(PROMPT), sampling)
        state = RequestState.of(request, self.num_added, dp_group=0)
        self.num_added += 1
        self.scheduler.add(state)
        return state

    def turn(self, token_ids: dict[int, int] | None = None) -> list[Output]:
        while len(self.plans) - self.num_returned < self.depth:
            batch = self.scheduler.schedule(len(self.plans))
            if batch is None:
                break
            self.plans.append(batch)
        step = self.num_returned
        self.num_returned += 1
        tokens = [SampledToken(slot, (token_ids or {}).get(slot, 7)) for slot in self.plans[step].sampling_slots]
        outputs = self.scheduler.update(StepResult.of(0, step, 0, tokens))
        self.scheduler.check_integrity()
        return list(outputs)


def test_a_plan_names_each_member_by_its_slot_alone_and_looks_at_it_once_a_block() -> None:
    bed = Bed()
    states = [bed.add(), bed.add()]
    for _ in range(40):
        outputs = bed.turn()
        assert [output.request_id for output in outputs] == ["r0", "r1"]
    shared = [[share.slot for share in batch.scheduled] for batch in bed.plans[1:]]
    decodes = [unpack(batch.decodes) for batch in bed.plans[1:]]
    slots = sorted(state.slot for state in states)
    assert all(sorted(one + other) == slots for one, other in zip(shared, decodes, strict=True))
    num_in_full = sum(map(len, shared))
    assert num_in_full <= 2 * 3 * len(bed.plans) // BLOCK_SIZE, "all but two tokens of a block come in lockstep"


@pytest.mark.parametrize("num_turns", range(1, 30))
def test_whoever_leaves_has_the_counters_that_it_would_have_had(num_turns: int) -> None:
    bed = Bed()
    state = bed.add()
    bed.add()
    for _ in range(num_turns):
        bed.turn()
    num_plans = len(bed.plans)
    bed.scheduler._lockstep.leave(state)
    assert state.num_pending == num_plans - bed.num_returned
    assert state.num_computed == state.num_sent == len(PROMPT) + num_plans - 1
    assert state.sample_step == state.last_step == num_plans - 1
    assert state.token_ids == PROMPT + [7] * num_turns
    outputs = [bed.turn() for _ in range(20)]
    assert all(len(each) == 2 for each in outputs), "it goes on as if nothing had been"


def test_a_stop_token_ends_a_member_and_no_other() -> None:
    bed = Bed()
    first, second = bed.add(), bed.add()
    for _ in range(3):
        bed.turn()
    assert first.lockstep_end != NO_STEP and second.lockstep_end != NO_STEP
    outputs = {output.request_id: output for output in bed.turn({first.slot: STOP})}
    assert outputs["r0"].finish_reason == FinishReason.STOP and outputs["r1"].finish_reason is None
    assert [output.request_id for output in bed.turn()] == ["r1"], "what was in flight for it is discarded"


def test_the_last_token_is_the_last() -> None:
    bed = Bed()
    state = bed.add(max_tokens=20)
    outputs = [output for _ in range(20) for output in bed.turn()]
    assert [output.finish_reason for output in outputs] == [None] * 19 + [FinishReason.LENGTH]
    assert len(state.token_ids) == len(PROMPT) + 20


def test_where_blocks_may_run_out_everybody_is_looked_at_and_the_youngest_yields() -> None:
    bed = Bed(num_blocks=1 + 9)
    for _ in range(3):
        bed.add(max_tokens=50)
    outputs: list[Output] = []
    while bed.scheduler.num_running or bed.scheduler.num_waiting:
        outputs += bed.turn()
    assert bed.scheduler.num_preemptions > 0
    assert [output.request_id for output in outputs if output.finish_reason] == ["r0", "r1", "r2"]
    assert sum(len(output.token_ids) for output in outputs) == 150
    assert any(batch.decodes for batch in bed.plans), "while there was room"


def test_full_blocks_of_members_can_be_shared() -> None:
    bed = Bed(keeps_prefixes=True)
    state = bed.add()
    for _ in range(30):
        bed.turn()
    assert state.num_kept_tokens >= 24


def test_packed_numbers() -> None:
    assert pack([1, -2, 300]) == b"\x01\0\0\0\xfe\xff\xff\xff\x2c\x01\0\0"
    assert unpack(pack(range(1000))) == list(range(1000)) and unpack(b"") == []
