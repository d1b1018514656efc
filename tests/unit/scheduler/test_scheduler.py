"""Single decisions of the scheduler, each in the smallest case that shows it."""

import pytest

from engine.config import KvGroupConfig
from engine.errors import ProtocolViolation
from engine.messages import NO_STEP, PromptLogprobs, SlotError
from engine.request import FinishReason, Output, TopLogprobs
from engine.scheduler.request_state import RequestState
from tests.support.scheduler_bed import Bed


def entries(start: int, end: int) -> list[TopLogprobs]:
    return [TopLogprobs(-float(position), 1, [], []) for position in range(start, end)]


def test_prompts_are_cut_to_the_budget_and_decodes_go_on_beside_them() -> None:
    bed = Bed(budget=8)
    bed.add(3)
    bed.add(12)
    assert bed.shares() == [(0, 0, 3), (1, 0, 5)]
    bed.update(0, {0: 7})
    assert bed.shares() == [(0, 3, 1), (1, 5, 7)]
    bed.update(1, {0: 7, 1: 7})
    assert bed.shares() == [(0, 4, 1), (1, 12, 1)]


def test_a_prompt_that_goes_first_leaves_each_other_request_its_token() -> None:
    bed = Bed(budget=8)
    bed.add(3)
    bed.add(2)
    bed.shares()
    bed.update(0, {0: 7, 1: 7})
    bed.add(30, priority=-1)
    assert bed.shares() == [(0, 3, 1), (1, 2, 1), (2, 0, 6)]
    bed.update(1, {0: 7, 1: 7})
    assert bed.shares() == [(2, 6, 6), (0, 4, 1), (1, 3, 1)], "by priority, yet within the budget of 8"


def test_lower_priority_numbers_are_admitted_first() -> None:
    bed = Bed(max_num_seqs=2)
    late = [bed.add(2, priority=priority) for priority in (1, 0, -1, 0)]
    bed.shares()
    assert [state.slot >= 0 for state in late] == [False, True, True, False]


def test_a_prompt_under_way_lets_one_of_better_priority_pass() -> None:
    bed = Bed(budget=8)
    bed.add(40)
    assert bed.shares() == [(0, 0, 8)]
    bed.update(0)
    bed.add(5, priority=1)
    bed.add(10, priority=-1)
    assert bed.shares() == [(0, 8, 1), (1, 0, 7)]
    bed.update(1)
    assert bed.shares() == [(1, 7, 3), (0, 9, 5)], "and what it leaves is the first's again, not the third's"
    bed.update(2, {1: 7})


def test_a_prompt_does_not_wait_for_one_that_does_not_fit() -> None:
    bed = Bed(budget=8, num_blocks=23)
    bed.add(40, max_tokens=2)
    bed.shares()
    bed.update(0)
    bed.add(38, max_tokens=2, priority=-1)
    assert bed.shares() == [(0, 8, 8)]


def test_the_victim_is_of_the_worst_priority() -> None:
    """The oldest, as it happens; the others lose nothing."""
    bed = Bed(num_blocks=1 + 10)
    cheap, usual, vital = bed.add(3, 6, priority=5), bed.add(4, 6), bed.add(4, 6, priority=-1)
    for step in range(20):
        batch = bed.schedule()
        assert batch is not None
        bed.update(step, {share.slot: 7 for share in batch.scheduled})
        if cheap.finished:
            break
    assert cheap.finished and bed.scheduler.num_preemptions >= 1
    assert (vital.entry_step, usual.entry_step) == (0, 0) and cheap.entry_step > 0


def test_no_token_is_scheduled_beyond_max_tokens() -> None:
    bed = Bed()
    bed.add(3, max_tokens=2)
    assert bed.shares() == [(0, 0, 3)]
    assert bed.shares() == [(0, 3, 1)]
    assert bed.schedule() is None, "both tokens are on their way"
    assert bed.update(0, {0: 7}) == [Output("r0", [7])]
    assert bed.update(1, {0: 8}) == [Output("r0", [8], FinishReason.LENGTH)]
    assert bed.scheduler.num_running == 0


def test_a_token_in_flight_is_referred_to_and_a_known_one_is_sent() -> None:
    bed = Bed()
    bed.add(3)
    bed.schedule()
    ahead = bed.schedule()
    assert ahead is not None
    assert (ahead.scheduled[0].token_ids, ahead.scheduled[0].input_step) == ([], 0)
    bed.update(0, {0: 7})
    bed.update(1, {0: 8})
    after = bed.schedule()
    assert after is not None
    assert (after.scheduled[0].token_ids, after.scheduled[0].input_step) == ([8], NO_STEP)


def test_without_references_a_decoding_request_is_in_one_plan_in_flight() -> None:
    bed = Bed(budget=4, input_references=False)
    bed.add(6)
    assert bed.shares() == [(0, 0, 4)]
    assert bed.shares() == [(0, 4, 2)], "chunks of a prompt may be in several"
    assert bed.schedule() is None
    bed.update(0)
    bed.update(1, {0: 7})
    assert bed.shares() == [(0, 6, 1)]
    assert bed.schedule() is None


def test_late_tokens_after_a_stop_are_discarded() -> None:
    bed = Bed()
    bed.add(3, stop_token_ids=(5,))
    for _ in range(3):
        bed.schedule()
    assert bed.update(0, {0: 5}) == [Output("r0", [5], FinishReason.STOP, stop_token_id=5)]
    assert bed.scheduler.num_blocks_used == 3, "plans in flight still name them"
    assert bed.update(1, {0: 9}) == []
    assert bed.update(2, {0: 5}) == []
    assert bed.scheduler.num_blocks_used == 0


def test_a_slot_that_changed_hands_keeps_late_tokens_apart() -> None:
    bed = Bed(max_num_seqs=1)
    bed.add(3, stop_token_ids=(5,))
    bed.schedule()
    bed.schedule()
    bed.add(2)
    bed.update(0, {0: 5})
    batch = bed.schedule()
    assert batch is not None
    assert (batch.removed, [new.slot for new in batch.new]) == ([0], [0])
    assert bed.update(1, {0: 77}) == []
    assert bed.update(2, {0: 8}) == [Output("r1", [8])]


def test_stop_tokens_do_not_count_before_min_tokens() -> None:
    bed = Bed()
    bed.add(2, stop_token_ids=(5,), min_tokens=2)
    finishes = []
    for step in range(3):
        bed.schedule()
        finishes += [output.finish_reason for output in bed.update(step, {0: 5})]
    assert finishes == [None, None, FinishReason.STOP]


def test_stop_wins_over_length() -> None:
    bed = Bed()
    bed.add(2, max_tokens=1, stop_token_ids=(5,))
    bed.schedule()
    assert bed.update(0, {0: 5}) == [Output("r0", [5], FinishReason.STOP, stop_token_id=5)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    bed = Bed(num_blocks=7)  # 6 blocks: 12 positions
    bed.add(4, max_tokens=8)
    bed.add(4, max_tokens=8)
    bed.shares()
    bed.update(0, {0: 7, 1: 8})
    bed.shares()  # a third block for each: none is left
    bed.update(1, {0: 7, 1: 8})
    bed.shares()
    bed.update(2, {0: 7, 1: 8})
    batch = bed.schedule()
    assert batch is not None
    assert (batch.removed, [share.slot for share in batch.scheduled]) == ([1], [0])
    assert (bed.scheduler.num_preemptions, bed.scheduler.num_waiting) == (1, 1)
    bed.add(2, max_tokens=4)
    step = 3
    while not bed.update(step, {0: 7})[0].finish_reason:
        batch = bed.schedule()
        assert batch is not None and not batch.new, "the preempted request fits not yet, and nobody passes it"
        step += 1
    batch = bed.schedule()
    assert batch is not None
    assert [new.token_ids for new in batch.new] == [[100, 101, 102, 103, 8, 8, 8], [100, 101]]
    assert batch.new[0].num_prompt_tokens == 4


def preempted_in_flight() -> tuple[Bed, RequestState]:
    """The younger of two was preempted while the plan of step 3 still samples for it. There are blocks enough."""
    bed = Bed(num_blocks=20)
    bed.add(4, max_tokens=9)
    younger = bed.add(4, max_tokens=4, stop_token_ids=(5,))
    for step in range(3):
        bed.schedule()
        bed.update(step, {0: 7, 1: 8})
    bed.schedule()
    bed.scheduler._preempt(younger)
    bed.scheduler.check_integrity()
    return bed, younger


def test_a_preempted_request_is_not_admitted_before_its_token_has_arrived() -> None:
    bed, younger = preempted_in_flight()
    batch = bed.schedule()
    assert batch is not None and not batch.new
    assert bed.update(3, {0: 7, 1: 6}) == [Output("r0", [7]), Output("r1", [6], FinishReason.LENGTH)]
    assert younger.token_ids[4:] == [8, 8, 8, 6]
    assert bed.scheduler.num_waiting == 0, "it ended while it waited"


def test_blocks_of_one_request_wait_for_its_last_plan_only() -> None:
    bed = Bed(num_blocks=6)
    first = bed.add(2, max_tokens=1)
    bed.add(2, max_tokens=8)
    bed.schedule()
    bed.schedule()  # names the second alone
    assert Output("r0", [7], FinishReason.LENGTH) in bed.update(0, {0: 7, 1: 8})
    assert first.finished
    assert bed.scheduler.num_blocks_used == 2


def test_a_chunked_group_gives_blocks_back_when_its_chunk_has_passed() -> None:
    bed = Bed(kv_groups=(KvGroupConfig((0,), chunk_size=4),), budget=10)
    bed.add(10, max_tokens=4)
    bed.schedule()
    assert bed.scheduler.num_blocks_used == 5, "a step over several chunks needs all its positions"
    bed.update(0, {0: 7})
    assert bed.scheduler.num_blocks_used == 1
    bed.schedule()
    bed.update(1, {0: 7})
    assert bed.scheduler.num_blocks_used == 2, "positions 8 to 10 are of one chunk"
    bed.schedule()
    assert bed.scheduler.num_blocks_used == 2, "a plan in flight still reads the chunk that position 11 ends"
    bed.update(2, {0: 7})
    assert bed.scheduler.num_blocks_used == 0


def test_a_sliding_group_gives_back_what_is_behind_its_window() -> None:
    bed = Bed(kv_groups=(KvGroupConfig((0,), window_size=4),), budget=10)
    bed.add(10, max_tokens=6)
    bed.schedule()
    assert bed.scheduler.num_blocks_used == 5, "a step needs all its positions"
    bed.update(0, {0: 7})
    assert bed.scheduler.num_blocks_used == 2, "position 10 sees positions 7 to 9, in blocks 3 and 4"
    for step, num_in_flight in enumerate([3, 2, 3, 2], start=1):
        bed.schedule()
        assert bed.scheduler.num_blocks_used == num_in_flight
        bed.update(step, {0: 7})
        assert bed.scheduler.num_blocks_used == 2, f"after position {9 + step}"
    bed.schedule()
    bed.update(5, {0: 7})
    assert bed.scheduler.num_blocks_used == 0


@pytest.mark.parametrize("group", [KvGroupConfig((0,), chunk_size=4), KvGroupConfig((0,), window_size=3)], ids=str)
def test_a_prompt_longer_than_the_cache_is_served_in_pieces(group: KvGroupConfig) -> None:
    bed = Bed(kv_groups=(group,), num_blocks=4)
    bed.add(20, max_tokens=2)
    sizes = []
    while bed.num_steps < 20:
        batch = bed.schedule()
        if batch is None:
            break
        sizes.append(batch.scheduled[0].num_tokens)
        bed.update(bed.num_steps - 1, {0: 7} if batch.scheduled[0].sample else {})
    assert sum(sizes) == 21 and max(sizes) <= 6
    assert bed.scheduler.num_blocks_used == 0


def test_admission_leaves_a_block_for_each_running_request() -> None:
    bed = Bed(num_blocks=11)
    for num_prompt_tokens in (12, 4, 4):
        bed.add(num_prompt_tokens, max_tokens=8)
    batch = bed.schedule()
    assert batch is not None
    assert [len(new.token_ids) for new in batch.new] == [12, 4], "of 10 blocks 8 are used and 2 must stay free"


def test_nobody_is_admitted_behind_a_prompt_that_lacks_blocks() -> None:
    bed = Bed(kv_groups=(KvGroupConfig((0,), chunk_size=4),), num_blocks=6)
    bed.add(20, max_tokens=2)
    bed.add(1, max_tokens=2)
    starts = []
    while bed.num_steps < 5:
        batch = bed.schedule()
        assert batch is not None
        starts += [(share.start, share.num_tokens) for share in batch.scheduled]
        if len(batch.new) == 1 and len(batch.new[0].token_ids) == 1:
            break
        bed.update(bed.num_steps - 1, {0: 7} if batch.scheduled[0].sample else {})
    assert starts == [(0, 10), (10, 10 - 2), (18, 2), (0, 1)]


def test_abort_frees_a_waiting_and_a_running_request() -> None:
    bed = Bed(max_num_seqs=1)
    running, waiting = bed.add(3), bed.add(3)
    bed.schedule()
    bed.schedule()
    bed.scheduler.abort(waiting)
    bed.scheduler.abort(running)
    assert (bed.scheduler.num_running, bed.scheduler.num_waiting) == (0, 0)
    assert bed.schedule() is None
    assert bed.update(0, {0: 7}) == []
    assert bed.update(1, {0: 7}) == []
    assert bed.scheduler.num_blocks_used == 0


def test_an_error_ends_only_its_request() -> None:
    bed = Bed()
    bed.add(2)
    bed.add(2)
    bed.schedule()
    bed.schedule()
    assert bed.update(0, {1: 7}, errors=[SlotError(0, "not a number")]) == [
        Output("r1", [7]),
        Output("r0", [], FinishReason.ERROR, error="not a number"),
    ]
    assert bed.update(1, {0: 3, 1: 7}) == [Output("r1", [7])]


def test_prompt_logprobs_come_with_each_chunk_and_never_twice() -> None:
    bed = Bed(budget=4)
    state = bed.add(6, prompt_logprobs=0)
    bed.schedule()
    assert bed.update(0, prompt_logprobs=[PromptLogprobs(0, 1, entries(1, 5))]) == [
        Output("r0", [], prompt_logprobs=[None, *entries(1, 5)])
    ]
    bed.scheduler._preempt(state)
    bed.schedule()
    assert bed.update(1, prompt_logprobs=[PromptLogprobs(0, 1, entries(1, 5))]) == []
    bed.schedule()
    outputs = bed.update(2, {0: 7}, prompt_logprobs=[PromptLogprobs(0, 5, entries(5, 6))])
    assert outputs == [Output("r0", [7], prompt_logprobs=[*entries(5, 6)])]


def test_prompt_logprobs_of_a_single_token() -> None:
    bed = Bed()
    bed.add(1, prompt_logprobs=2)
    bed.schedule()
    assert bed.update(0, {0: 7}) == [Output("r0", [7], prompt_logprobs=[None])]


@pytest.mark.parametrize(
    ("tokens", "errors", "logprobs"),
    [
        ({}, [], []),
        ({0: 7}, [SlotError(0, "and an error")], []),
        ({0: 7, 1: 7}, [], []),
        ({0: 7}, [SlotError(1, "an error elsewhere")], []),
        ({0: 7}, [], [PromptLogprobs(1, 1, [])]),
        ({0: 7}, [], [PromptLogprobs(0, 2, entries(2, 3))]),
        ({0: 7}, [], [PromptLogprobs(0, 1, entries(1, 2))]),
        ({0: 7}, [], []),
    ],
    ids=["no token", "twice", "other slot", "other error", "other logprobs", "a gap", "too few", "none at all"],
)
def test_a_wrong_result_changes_nothing(
    tokens: dict[int, int], errors: list[SlotError], logprobs: list[PromptLogprobs]
) -> None:
    bed = Bed()
    state = bed.add(3, prompt_logprobs=0)
    bed.schedule()
    with pytest.raises(ProtocolViolation):
        bed.update(0, tokens, errors, logprobs)
    assert len(state.token_ids) == 3 and not state.finished and state.num_prompt_logprobs == 0
