"""What a rank accepts, what it refuses, and what it then knows."""

import pytest

from engine.config import KvGroupConfig
from engine.errors import ProtocolViolation
from engine.messages import NO_STEP, NULL_BLOCK, BatchPlan, NewRequest, ScheduledRequest, StepPlan
from engine.packed import pack
from engine.request import SamplingParams
from engine.slot_table import ScheduledSlot, SlotTable

GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=4))
SAMPLING = SamplingParams(max_tokens=8)
PROMPT = [10, 11, 12, 13, 14]


def new_table(**changes: int) -> SlotTable:
    options = {"num_slots": 2, "block_size": 2, "num_blocks": 20, "epoch": 3, "dp_group": 0} | changes
    return SlotTable(kv_groups=GROUPS, **options)


def plan(
    step: int,
    *shares: ScheduledRequest,
    new: tuple[NewRequest, ...] = (),
    removed: tuple[int, ...] = (),
    epoch: int = 3,
) -> StepPlan:
    return StepPlan(epoch, step, [BatchPlan(list(removed), list(new), list(shares))])


def whole_prompt(slot: int = 0, first_block: int = 1) -> tuple[NewRequest, ScheduledRequest]:
    blocks = list(range(first_block, first_block + 6))
    return (
        NewRequest(slot, PROMPT, len(PROMPT), SAMPLING),
        ScheduledRequest(slot, 0, 5, [], [blocks[:3], blocks[3:]], sample=True),
    )


def tables(share: ScheduledSlot) -> list[list[int]]:
    return [list(table) for table in share.state.block_tables]


def prefilled() -> SlotTable:
    table = new_table()
    new, share = whole_prompt()
    table.apply(plan(0, share, new=(new,)))
    return table


def decode(start: int = 5, **changes: object) -> ScheduledRequest:
    fields = {"slot": 0, "start": start, "num_tokens": 1, "token_ids": [99], "new_block_ids": [], "sample": True}
    return ScheduledRequest(**(fields | changes))  # type: ignore[arg-type]


def test_a_prompt_in_chunks() -> None:
    table = new_table()
    new, _ = whole_prompt()
    (first,) = table.apply(plan(0, ScheduledRequest(0, 0, 3, [], [[1, 2], [3, 4]], sample=False), new=(new,)))
    assert (first.slot, first.start, first.num_tokens, first.sample) == (0, 0, 3, False)
    assert first.token_ids == [10, 11, 12]
    (second,) = table.apply(plan(1, ScheduledRequest(0, 3, 2, [], [[5], [6]], sample=True)))
    assert second.token_ids == [13, 14]
    assert tables(second) == [[1, 2, 5], [3, 4, 6]]
    assert (second.state.num_computed, second.state.num_generated) == (5, 0)


def test_a_token_by_value() -> None:
    (share,) = prefilled().apply(plan(1, decode()))
    assert share.token_ids == [99]
    assert share.state.token_ids == [*PROMPT, 99]
    assert share.state.num_generated == 1


def test_a_packed_decode_is_the_next_token_by_reference() -> None:
    table = prefilled()
    table.record_sample(0, 0, 98)
    (share,) = table.apply(StepPlan(3, 1, [BatchPlan([], [], [], decodes=pack([0]))]))
    assert (share.slot, share.start, share.num_tokens, share.sample, share.token_ids) == (0, 5, 1, True, [98])
    table.record_sample(1, 0, 99)
    assert table.state(0).token_ids == [*PROMPT, 98, 99]


@pytest.mark.parametrize("decodes", [pack([0]), pack([1]), pack([7]), pack([-1]), b"123"])
def test_a_packed_decode_without_what_it_refers_to_is_refused(decodes: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        prefilled().apply(StepPlan(3, 1, [BatchPlan([], [], [], decodes=decodes)]))


def test_a_packed_decode_beyond_its_blocks_or_named_twice_is_refused() -> None:
    for decodes in (pack([0, 0]), pack([0])):
        table = prefilled()
        table.record_sample(0, 0, 98)
        step = 1
        if len(decodes) == 4:
            table.apply(StepPlan(3, 1, [BatchPlan([], [], [], decodes=decodes)]))
            table.record_sample(1, 0, 99)
            step = 2
        with pytest.raises(ProtocolViolation):
            table.apply(StepPlan(3, step, [BatchPlan([], [], [], decodes=decodes)]))


def test_a_token_by_reference() -> None:
    table = prefilled()
    table.record_sample(0, 0, 42)
    (share,) = table.apply(plan(1, decode(token_ids=[], input_step=0)))
    assert share.token_ids == [42]


def test_a_rank_that_sampled_also_takes_the_value() -> None:
    table = prefilled()
    table.record_sample(0, 0, 99)
    (share,) = table.apply(plan(1, decode()))
    assert share.state.token_ids == [*PROMPT, 99]


def test_a_chunked_group_forgets_what_it_no_longer_sees() -> None:
    table = prefilled()
    (at_5,) = table.apply(plan(1, decode()))
    # Position 5 lies in the chunk of positions 4 to 7: positions 0 to 3, two blocks, are out of sight.
    assert tables(at_5) == [[1, 2, 3], [NULL_BLOCK, NULL_BLOCK, 6]]


def test_a_slot_changes_hands_within_a_plan() -> None:
    table = prefilled()
    new, share = whole_prompt(first_block=7)
    (given,) = table.apply(plan(1, share, new=(new,), removed=(0,)))
    assert tables(given) == [[7, 8, 9], [10, 11, 12]]
    assert table.num_live == 1
    table.apply(plan(2, removed=(0,)))
    assert table.num_live == 0


def test_a_rank_reads_the_batch_of_its_dp_group() -> None:
    table = new_table(dp_group=1)
    new, share = whole_prompt()
    idle = BatchPlan([], [], [])
    assert table.apply(StepPlan(3, 0, [BatchPlan([], [new], [share]), idle])) == []
    assert len(table.apply(StepPlan(3, 1, [idle, BatchPlan([], [new], [share])]))) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (plan(1, decode(), epoch=2), "epoch 2 reached a rank of epoch 3"),
        (plan(2, decode()), "step 2 where step 1 was due"),
        (plan(0, decode()), "step 0 where step 1 was due"),
        (StepPlan(3, 1, []), "none for dp group 0"),
        (plan(1, decode(slot=1)), "slot 1 holds no request"),
        (plan(1, decode(slot=7)), "slot 7 holds no request"),
        (plan(1, removed=(1,)), "removes slot 1"),
        (plan(1, new=(whole_prompt()[0],)), "gives slot 0 away"),
        (plan(1, new=(whole_prompt(slot=2)[0],)), "slots are 0 to 1"),
        (plan(1, new=(NewRequest(1, [1], 2, SAMPLING),)), "2 prompt tokens of 1"),
        (plan(1, decode(start=6)), "but 5 is due"),
        (plan(1, decode(start=4)), "but 5 is due"),
        (plan(1, decode(num_tokens=0)), "but 5 is due"),
        (plan(1, decode(), decode(start=6, new_block_ids=[[7], [8]])), "schedules a slot twice"),
        (plan(1, decode(token_ids=[])), "no token is known at position 5"),
        (plan(1, decode(token_ids=[98, 99])), "do not continue"),
        (plan(1, decode(num_tokens=3, new_block_ids=[[7], [8]])), "do not continue"),
        (plan(1, decode(token_ids=[], input_step=0)), "the input refers to step 0"),
        (plan(1, decode(sample=False)), "sample is False after position 5 of 6 known tokens"),
        (plan(1, decode(new_block_ids=[[7]])), "blocks for 1 KV groups of 2"),
        (plan(1, decode(new_block_ids=[[20], [7]])), "block 20; blocks are 1 to 19"),
        (plan(1, decode(new_block_ids=[[7], [NULL_BLOCK]])), "block 0; blocks are 1 to 19"),
        (plan(1, decode(num_tokens=2, token_ids=[98, 99])), "3 blocks in KV group 0 do not hold 7 tokens"),
    ],
)
def test_what_is_forbidden(message: StepPlan, reason: str) -> None:
    with pytest.raises(ProtocolViolation, match=reason):
        prefilled().apply(message)


def test_values_that_differ_from_the_own_sample_are_refused() -> None:
    table = prefilled()
    table.record_sample(0, 0, 42)
    with pytest.raises(ProtocolViolation, match="do not continue"):
        table.apply(plan(1, decode()))


def test_a_reference_to_an_older_step_is_refused() -> None:
    table = prefilled()
    table.record_sample(0, 0, 42)
    table.apply(plan(1, decode(token_ids=[], input_step=0)))
    table.record_sample(1, 0, 43)
    with pytest.raises(ProtocolViolation, match="refers to step 0"):
        table.apply(plan(2, decode(start=6, token_ids=[], input_step=0, new_block_ids=[[7], [8]])))


def test_a_prompt_whose_last_chunk_does_not_sample_is_refused() -> None:
    new, share = whole_prompt()
    share = ScheduledRequest(0, 0, 5, [], share.new_block_ids, sample=False, input_step=NO_STEP)
    with pytest.raises(ProtocolViolation, match="sample is False"):
        new_table().apply(plan(0, share, new=(new,)))


@pytest.mark.parametrize(("step", "slot"), [(1, 0), (0, 1)])
def test_a_sample_that_nobody_wanted_is_refused(step: int, slot: int) -> None:
    with pytest.raises(ProtocolViolation):
        prefilled().record_sample(step, slot, 5)


def test_a_second_sample_is_refused() -> None:
    table = prefilled()
    table.record_sample(0, 0, 5)
    with pytest.raises(ProtocolViolation, match="was wanted"):
        table.record_sample(0, 0, 5)
