"""The plan that is made before it can leave: what it holds, and what still changes it."""

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import BatchPlan, SampledToken, SlotError, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler

STOP = 9


class Bed:
    """Requests that decode; the draft of plan 1 is made while plan 0 is in flight."""

    def __init__(self, num_requests: int, max_tokens: int = 50) -> None:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=100)
        self.scheduler = Scheduler(config, CacheConfig(4, 30), (KvGroupConfig((0,)),))
        self.states = [self.add(number, max_tokens) for number in range(num_requests)]
        assert self.scheduler.schedule(0) is not None
        self.draft = self.scheduler.draft(1)

    def add(self, number: int, max_tokens: int = 50) -> RequestState:
        sampling = SamplingParams(max_tokens, stop_token_ids=(STOP,))
        state = RequestState.of(Request(f"r{number}", [1, 2, 3], 3, sampling), number, 0)
        self.scheduler.add(state)
        return state

    def slots(self, batch: BatchPlan | None) -> list[int]:
        self.scheduler.check_integrity()
        return [] if batch is None else [share.slot for share in batch.scheduled]


def result(*token_ids: int) -> StepResult:
    return StepResult(0, 0, 0, [SampledToken(slot, token_id) for slot, token_id in enumerate(token_ids)])


def test_a_draft_refers_to_what_the_plan_in_flight_samples_and_leaves_as_it_is() -> None:
    bed = Bed(2)
    assert bed.draft is not None
    assert [(share.start, share.token_ids, share.input_step) for share in bed.draft.scheduled] == [(3, [], 0)] * 2
    assert bed.scheduler.is_final(result(5, 6))
    assert bed.scheduler.schedule(1) is bed.draft
    assert [output.token_ids for output in bed.scheduler.update(result(5, 6))] == [[5], [6]]


def test_nothing_is_computed_for_a_request_that_has_stopped() -> None:
    bed = Bed(2)
    assert not bed.scheduler.is_final(result(STOP, 6))
    bed.scheduler.update(result(STOP, 6))
    batch = bed.scheduler.schedule(1)
    assert bed.slots(batch) == [1]
    assert batch is not None and batch.removed == [0]


def test_an_error_ends_a_request_of_the_draft() -> None:
    bed = Bed(2)
    failed = StepResult(0, 0, 0, [SampledToken(1, 6)], errors=[SlotError(0, "not a number")])
    assert not bed.scheduler.is_final(failed)
    bed.scheduler.update(failed)
    assert bed.slots(bed.scheduler.schedule(1)) == [1]


def test_who_comes_meanwhile_is_admitted_behind_the_draft_and_may_take_a_slot_that_it_frees() -> None:
    bed = Bed(4)
    bed.add(4)
    assert bed.scheduler.is_final(result(5, 5, 5, 5)), "there is no slot for the fifth"
    bed.scheduler.abort(bed.states[2])
    assert not bed.scheduler.is_final(result(5, 5, 5, 5))
    batch = bed.scheduler.schedule(1)
    assert bed.slots(batch) == [0, 1, 3, 2]
    assert batch is not None and (batch.removed, [request.slot for request in batch.new]) == ([2], [2])


def test_a_draft_that_is_left_with_nothing_is_withdrawn() -> None:
    bed = Bed(1)
    bed.scheduler.abort(bed.states[0])
    assert bed.scheduler.schedule(1) is None
    bed.scheduler.update(result(5))
    assert bed.scheduler.num_blocks_used == 0
    bed.add(1)
    batch = bed.scheduler.schedule(1)
    assert bed.slots(batch) == [0]
    assert batch is not None and batch.removed == [0]


def test_a_last_token_is_known_and_not_drafted_behind() -> None:
    bed = Bed(1, max_tokens=1)
    assert bed.draft is None
    assert not bed.scheduler.is_final(result(5))
