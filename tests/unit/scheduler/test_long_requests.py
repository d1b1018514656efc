"""A request of a million tokens: chunked, found by its prefix, preempted and resumed, with work per step that does not
grow with it. Work is counted in calls and bytes, never in seconds."""

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.executor.channel import MAX_FRAME_BYTES
from engine.messages import BatchPlan, SampledToken, StepPlan, StepResult, decode_to_rank, encode
from engine.request import Request, SamplingParams
from engine.scheduler import block_tables
from engine.scheduler.request_state import NO_SLOT, RequestState
from engine.scheduler.scheduler import Scheduler
from engine.slot_table import SlotTable

MILLION = 2**20
BLOCK_SIZE = 16
FULL = KvGroupConfig((0,))
PROMPT = [index * 2654435761 % 100_003 for index in range(MILLION)]


@dataclass
class Work:
    """What one call cost: functions called, Python's own and built-in, and the most bytes allocated at once."""

    num_calls: int = 0
    num_bytes: int = 0


def measure(function: Callable[[], Any]) -> Work:
    work = Work()

    def count(frame: Any, event: str, argument: Any) -> None:
        work.num_calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        work.num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return work


@dataclass
class Bed:
    """A scheduler, one rank's slot table behind the real wire, and results with token 7 everywhere."""

    num_blocks: int = 70_000
    max_num_batched_tokens: int = 8192
    num_steps: int = 0
    num_added: int = 0
    batches: list[BatchPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SchedulerConfig(4, self.max_num_batched_tokens, 2 * MILLION)
        self.scheduler = Scheduler(config, CacheConfig(BLOCK_SIZE, self.num_blocks), (FULL,))
        self.table = SlotTable(
            num_slots=4, kv_groups=(FULL,), block_size=BLOCK_SIZE, num_blocks=self.num_blocks, epoch=0
        )

    def add(self, token_ids: list[int], max_tokens: int = 100) -> RequestState:
        request = Request(f"r{self.num_added}", token_ids, len(token_ids), SamplingParams(max_tokens))
        state = RequestState.of(request, self.num_added, 0)
        self.num_added += 1
        self.scheduler.add(state)
        return state

    def schedule(self) -> None:
        batch = self.scheduler.schedule(self.num_steps)
        assert batch is not None
        assert sum(share.num_tokens for share in batch.scheduled) <= self.max_num_batched_tokens
        self.batches.append(batch)
        self.num_steps += 1

    def answer(self) -> None:
        sampled = [SampledToken(slot, 7) for slot in self.batches[-1].sampling_slots]
        self.scheduler.update(StepResult(0, self.num_steps - 1, 0, sampled))

    def apply(self) -> None:
        data = encode(StepPlan(0, self.num_steps - 1, [self.batches[-1]]))
        assert len(data) < MAX_FRAME_BYTES
        plan = decode_to_rank(data)
        assert isinstance(plan, StepPlan)
        self.table.apply(plan)
        for slot in plan.batches[0].sampling_slots:
            self.table.record_sample(plan.step, slot, 7)

    def step(self) -> None:
        self.schedule()
        self.apply()
        self.answer()

    def measured_step(self) -> Work:
        works = [measure(part) for part in (self.schedule, self.apply, self.answer)]
        return Work(sum(work.num_calls for work in works), max(work.num_bytes for work in works))


def test_a_million_tokens_in_chunks_and_then_decoding_at_the_cost_of_a_short_request() -> None:
    bed = Bed()
    short = bed.add(PROMPT[:20])
    bed.step()
    bed.step()
    decode_work = bed.measured_step()
    bed.scheduler.abort(short)

    state = bed.add(PROMPT)
    bed.step()
    num_chunk_blocks = bed.max_num_batched_tokens // BLOCK_SIZE
    chunk_works = [bed.measured_step() for _ in range(4)]
    while state.num_computed < MILLION - 5 * bed.max_num_batched_tokens:
        bed.step()
    chunk_works += [bed.measured_step() for _ in range(4)]
    for work in chunk_works:
        assert work.num_calls < 20 * num_chunk_blocks
    assert chunk_works[-1].num_calls <= 1.05 * chunk_works[0].num_calls
    assert chunk_works[-1].num_bytes <= 1.5 * chunk_works[0].num_bytes < 8 * MILLION / 4

    while state.num_generated == 0:
        bed.step()
    assert len(bed.batches) == 3 + MILLION // bed.max_num_batched_tokens
    late_works = [bed.measured_step() for _ in range(2 * BLOCK_SIZE)]
    # A decode step in which a block fills up names and keeps one.
    assert max(work.num_calls for work in late_works) <= decode_work.num_calls + 40
    assert min(work.num_calls for work in late_works) <= decode_work.num_calls
    # Leader and rank each have a list that must be moved as a whole, once in a hundred thousand tokens.
    assert sorted(work.num_bytes for work in late_works)[-3] <= 16_384
    bed.scheduler.check_integrity()


def test_the_second_finds_a_million_tokens_while_others_go_on() -> None:
    bed = Bed()
    first = bed.add(PROMPT)
    while first.num_generated == 0:
        bed.step()
    second = bed.add(PROMPT)
    num_before, works = first.num_generated, []
    while second.slot == NO_SLOT:
        works.append(bed.measured_step())
    assert second.num_cached_tokens == MILLION - BLOCK_SIZE
    assert second.num_computed == MILLION, "what is left of it is computed at once"
    num_looks = -(-(MILLION // BLOCK_SIZE - 1) // block_tables._MAX_NAMED)
    assert len(works) == num_looks and first.num_generated == num_before + num_looks
    # A part of the names in each step; the last one also shares the blocks and introduces the request.
    assert max(work.num_calls for work in works[:-1]) < 5 * block_tables._MAX_NAMED
    bed.scheduler.check_integrity()


def test_a_long_prompt_that_nobody_had_is_not_named_before_it_is_computed() -> None:
    bed = Bed()
    state = bed.add(PROMPT)
    assert measure(bed.schedule).num_calls < 4 * bed.max_num_batched_tokens // BLOCK_SIZE
    assert len(state.block_hashes) <= block_tables._NAMED_AT_ONCE


def test_a_preempted_million_finds_its_own_blocks_again() -> None:
    """The older request grows into the last free blocks; the younger, longer one yields and comes back."""
    bed = Bed(num_blocks=1 + MILLION // BLOCK_SIZE + 8)
    older = bed.add(PROMPT[500:520], max_tokens=300)
    bed.step()
    younger = bed.add(PROMPT[: MILLION - 80], max_tokens=80)
    while bed.scheduler.num_preemptions == 0:
        bed.step()
    assert younger.slot == NO_SLOT and older.slot != NO_SLOT
    num_generated = younger.num_generated
    assert num_generated > 0
    works = []
    while older.num_generated < 300:
        works.append(bed.measured_step().num_calls)
    # That it does not fit yet is looked at once in a while.
    num_blocks = MILLION // BLOCK_SIZE
    assert len(works) > 50 and sum(works) < 10 * num_blocks + 2000 * len(works)
    bed.step()
    assert younger.slot != NO_SLOT
    assert younger.num_computed >= MILLION - 80 - 8192
    computed = sum(share.num_tokens for share in bed.batches[-1].scheduled)
    assert computed <= 8192, "it does not begin anew"
    bed.scheduler.check_integrity()
