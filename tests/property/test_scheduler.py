"""The scheduler alone, with plans and results in any legal interleaving: budgets, order of admission, no starvation."""

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.kv_groups import num_blocks_needed
from engine.messages import BatchPlan, SampledToken, StepResult
from engine.packed import unpack
from engine.request import FinishReason, Output, Request, SamplingParams, Tenant
from engine.scheduler.request_state import NO_SLOT, RequestState
from engine.scheduler.scheduler import Scheduler

STOP_TOKEN = 1
MAX_DEPTH = 4
MAX_NUM_TOKENS = 32
KV_GROUPS = (
    (KvGroupConfig((0,)),),
    (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=4)),
    (KvGroupConfig((0,), chunk_size=5), KvGroupConfig((1,))),
    (KvGroupConfig((0,), window_size=3),),
    (KvGroupConfig((0,)), KvGroupConfig((1,), window_size=6)),
    (KvGroupConfig((0,), chunk_size=4), KvGroupConfig((1,), window_size=5)),
)


@dataclass
class Live:
    state: RequestState
    admitted: bool = False
    num_computed: int = 0
    num_tokens_out: int = 0
    has_begun: bool = False


class SchedulerMachine(RuleBasedStateMachine):
    """``live`` is in order of arrival; ``slots`` is what ranks believe after all plans so far."""

    @initialize(
        kv_groups=st.sampled_from(KV_GROUPS),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_spare_blocks=st.one_of(st.integers(-4, 8), st.just(100)),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 12),
        keeps_prefixes=st.booleans(),
        weights=st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=1, max_size=3),
    )
    def begin(
        self,
        kv_groups: tuple[KvGroupConfig, ...],
        block_size: int,
        num_spare_blocks: int,
        max_num_seqs: int,
        extra_budget: int,
        keeps_prefixes: bool,
        weights: list[float],
    ) -> None:
        self.tenants = [Tenant(f"t{index}", weight) for index, weight in enumerate(weights)]
        self.block_size, self.keeps_prefixes = block_size, keeps_prefixes
        self.config = SchedulerConfig(max_num_seqs, max_num_seqs + extra_budget)
        num_blocks = 1 + num_blocks_needed(kv_groups, MAX_NUM_TOKENS, block_size) + num_spare_blocks
        self.scheduler = Scheduler(self.config, CacheConfig(block_size, num_blocks, keeps_prefixes), kv_groups)
        self.live: dict[str, Live] = {}
        self.slots: dict[int, str] = {}
        self.in_flight: deque[tuple[int, BatchPlan]] = deque()
        self.num_added = 0
        self.num_ended = 0
        self.next_step = 0

    @rule(batch=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=6))
    def add(self, batch: list[tuple[int, int]]) -> None:
        for num_prompt_tokens, max_tokens in batch:
            self.add_one(num_prompt_tokens, max_tokens)
        self.scheduler.check_integrity()

    def add_one(self, num_prompt_tokens: int, max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens, stop_token_ids=(STOP_TOKEN,))
        tenant = self.tenants[self.num_added % len(self.tenants)]
        request = Request(f"r{self.num_added}", [0] * num_prompt_tokens, num_prompt_tokens, sampling, tenant=tenant)
        state = RequestState.of(request, self.num_added, dp_group=0)
        if not self.scheduler.fits(state):
            return
        self.scheduler.add(state)
        self.live[request.request_id] = Live(state)
        self.num_added += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.scheduler.abort(live.state)
        self.num_ended += 1
        self.scheduler.check_integrity()

    @precondition(lambda self: len(self.in_flight) < MAX_DEPTH)
    @rule()
    def schedule(self) -> None:
        oldest = next((live.state for live in self.live.values()), None)
        ran = oldest is not None and oldest.slot != NO_SLOT
        batch = self.scheduler.schedule(self.next_step)
        self.scheduler.check_integrity()
        assert oldest is None or not ran or oldest.slot != NO_SLOT, "the oldest request was preempted"
        if batch is None:
            assert self.in_flight or not self.live, "requests wait, and nothing will ever wake them"
            return
        self.in_flight.append((self.next_step, batch))
        self.next_step += 1
        self.check_batch(batch)

    def check_batch(self, batch: BatchPlan) -> None:
        decodes = unpack(batch.decodes)
        assert decodes or batch.scheduled
        assert len(decodes) + len(batch.scheduled) <= self.config.max_num_seqs
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        for slot in batch.removed:
            request_id = self.slots.pop(slot)
            if request_id in self.live:
                self.live[request_id].num_computed = 0
        for new in batch.new:
            assert new.slot not in self.slots
            live = next(live for live in self.live.values() if live.state.slot == new.slot)
            assert live.num_computed == 0
            assert new.token_ids == live.state.token_ids
            live.num_computed = len(new.block_ids[0]) * self.block_size if new.block_ids else 0
            assert live.num_computed < len(new.token_ids) and (self.keeps_prefixes or not new.block_ids)
            self.slots[new.slot] = live.state.request_id
            live.admitted = True
        for slot in decodes:
            self.live[self.slots[slot]].num_computed += 1
        for share in batch.scheduled:
            live = self.live[self.slots[share.slot]]
            assert share.start == live.num_computed and share.num_tokens >= 1
            live.num_computed += share.num_tokens
        for tenant in self.tenants:
            admitted = [live.admitted for live in self.live.values() if live.state.tenant == tenant]
            assert admitted == sorted(admitted, reverse=True), "a younger request was admitted before an older one"

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def result_returns(self, data: st.DataObject) -> None:
        step, batch = self.in_flight.popleft()
        slots = batch.sampling_slots
        tokens = data.draw(st.lists(st.integers(0, 12), min_size=len(slots), max_size=len(slots)))
        self.take(step, [SampledToken(slot, token) for slot, token in zip(slots, tokens, strict=True)])

    def take(self, step: int, sampled: list[SampledToken]) -> None:
        outputs = self.scheduler.update(StepResult.of(0, step, 0, sampled))
        self.scheduler.check_integrity()
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            self.check_output(self.live[output.request_id], output)

    def check_output(self, live: Live, output: Output) -> None:
        if not output.token_ids:
            assert not live.has_begun and output == Output(live.state.request_id, [])
            live.has_begun = True
            return
        assert len(output.token_ids) == 1
        live.num_tokens_out += 1
        at_end = live.num_tokens_out == live.state.sampling.max_tokens
        if output.token_ids == [STOP_TOKEN]:
            assert output.finish_reason == FinishReason.STOP
        else:
            assert output.finish_reason == (FinishReason.LENGTH if at_end else None)
        if output.finish_reason is not None:
            del self.live[output.request_id]
            self.num_ended += 1

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(40 * MAX_DEPTH * (len(self.live) + 1)):
            if not self.live and not self.in_flight:
                break
            self.schedule()
            if self.in_flight:
                step, batch = self.in_flight.popleft()
                self.take(step, [SampledToken(slot, 0) for slot in batch.sampling_slots])
        assert not self.live and self.num_ended == self.num_added, "requests starve"
        assert (self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.num_blocks_used) == (0, 0, 0)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40)


@pytest.mark.full
class TestSchedulerManyExamples(SchedulerMachine.TestCase):
    settings = settings(max_examples=1500, stateful_step_count=60)
