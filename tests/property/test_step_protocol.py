"""The real engine over simulated ranks, with 1 to 4 plans in flight, results as late as can be and gangs that die.

Whatever is added, aborted, preempted or begun anew: every block holds what each plan in flight reads from it, every
request ends exactly once, nothing is left over, and the tokens are those of a request that runs alone.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cluster.simulate.gang import SimulatedGang, embedding_of, logprobs_at, sequential_tokens
from engine.config import CacheConfig, KvGroupConfig, LoraConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import AdapterError, ContextLengthExceeded, EngineFailure, Overloaded, RankFailure
from engine.kv_groups import num_blocks_needed
from engine.messages import NO_STEP
from engine.outputs import Outputs
from engine.packed import unpack
from engine.request import AdapterInfo, FinishReason, Output, Pooling, Request, SamplingParams, Tenant, TopLogprobs
from engine.scheduler.break_trials import SUSPECT_AFTER

VOCAB_SIZE = 23
MAX_MODEL_LEN = 28
FULL = KvGroupConfig((0,))
KV_GROUPS = (
    (FULL,),
    (FULL, KvGroupConfig((1,), chunk_size=4)),
    (KvGroupConfig((0,), chunk_size=3), FULL),
    (KvGroupConfig((0,), chunk_size=6),),
    (FULL, FULL, KvGroupConfig((2,), chunk_size=8)),
    (KvGroupConfig((0,), window_size=1),),
    (KvGroupConfig((0,), window_size=6),),
    (FULL, KvGroupConfig((1,), window_size=4)),
    (KvGroupConfig((0,), window_size=7), KvGroupConfig((1,), chunk_size=5), FULL),
)

requests = st.tuples(
    st.integers(1, 18),
    st.builds(
        lambda max_tokens, min_tokens, stop, logprobs: SamplingParams(
            max_tokens, min_tokens=min(min_tokens, max_tokens), stop_token_ids=tuple(stop), prompt_logprobs=logprobs
        ),
        st.integers(1, 14),
        st.integers(0, 6),
        st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        st.sampled_from([None, None, 0]),
    )
    | st.sampled_from([SamplingParams(0, pooling=pooling) for pooling in Pooling]),
    st.integers(-1, 1),
    st.integers(0, 3),
    st.sampled_from([False] * 9 + [True]),
    st.integers(0, 2),
)
"""Tokens given, sampling, priority, how many of the tokens given were generated before (after a failover), whether the
first position after them cannot be computed, and which of the loaded adapters it has (0: none)."""


def beginning(number: int, position: int) -> int:
    """The token of request ``number`` at ``position``: many begin alike, and part sooner or later."""
    own = number if position >= number * 7 % 17 else 0
    return (number % 2 * 31 + position * 5 + position // 3 + own) % VOCAB_SIZE


@dataclass
class Record:
    request: Request
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    finish: Output | None = None
    aborted: bool = False
    adapter_path: str = ""
    num_deaths: int = 0
    """Times that the gang died while it was live."""


class StepProtocolMachine(RuleBasedStateMachine):
    depth: ClassVar[int] = 1
    input_references: ClassVar[bool] = True

    @initialize(
        kv_groups=st.sampled_from(KV_GROUPS),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_spare_blocks=st.one_of(st.integers(-4, 10), st.just(100)),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 8),
        num_dp_groups=st.sampled_from([1, 1, 2]),
    )
    def begin(
        self,
        kv_groups: tuple[KvGroupConfig, ...],
        block_size: int,
        num_spare_blocks: int,
        max_num_seqs: int,
        extra_budget: int,
        num_dp_groups: int,
    ) -> None:
        self.config = SchedulerConfig(max_num_seqs, max_num_seqs + extra_budget, MAX_MODEL_LEN, 12, self.depth)
        num_blocks = 1 + num_blocks_needed(kv_groups, MAX_MODEL_LEN, block_size) + num_spare_blocks
        self.cache = CacheConfig(block_size, num_blocks)
        self.kv_groups = kv_groups
        self.num_dp_groups = num_dp_groups
        self.epoch = 0
        self.fails_at: set[tuple[int, int]] = set()
        self.records: dict[str, Record] = {}
        self.adapter_of: dict[int, str] = {}
        self.broken_adapters: set[str] = set()
        self.loads: list[tuple[str, Future[AdapterInfo]]] = []
        self.unloads: list[tuple[str, Future[None]]] = []
        self.gang = self.new_gang()
        self.engine = Engine(
            executor=self.gang,
            kv_groups=kv_groups,
            vocab_size=VOCAB_SIZE,
            scheduler_config=self.config,
            cache_config=self.cache,
            num_dp_groups=num_dp_groups,
            input_references=self.input_references,
            lora_config=LoraConfig(max_loras=2),
        )

    def new_gang(self) -> SimulatedGang:
        return SimulatedGang(
            num_slots=self.config.max_num_seqs,
            kv_groups=self.kv_groups,
            block_size=self.cache.block_size,
            num_blocks=self.cache.num_blocks,
            vocab_size=VOCAB_SIZE,
            depth=self.depth,
            epoch=self.epoch,
            num_dp_groups=self.num_dp_groups,
            input_references=self.input_references,
            fails_at=self.fails_at,
            adapter_of=self.adapter_of,
            broken_adapters=self.broken_adapters,
        )

    def live(self) -> list[str]:
        return [request_id for request_id, record in self.records.items() if record.finish is None]

    @rule(batch=st.lists(requests, min_size=1, max_size=6))
    def add(self, batch: list[tuple[int, SamplingParams, int, int, bool, int]]) -> None:
        for parts in batch:
            self.add_one(*parts)
        self.engine.check_integrity()

    def add_one(
        self,
        num_tokens: int,
        sampling: SamplingParams,
        priority: int,
        num_generated: int,
        poisoned: bool,
        adapter_index: int,
    ) -> None:
        number = len(self.records)
        token_ids = [beginning(number, position) for position in range(num_tokens)]
        sampling = SamplingParams(*(number if name == "seed" else getattr(sampling, name) for name in FIELDS))
        num_prompt_tokens = max(1, len(token_ids) - max(0, min(num_generated, sampling.max_tokens - 1)))
        adapter = (("", ""), *((info.name, info.path) for info in self.engine.adapters))[
            adapter_index % (1 + len(self.engine.adapters))
        ]
        tenant = Tenant(f"tenant-{number % 3}", 1.0 + number % 2)
        request = Request(
            f"request-{number}", token_ids, num_prompt_tokens, sampling, priority, adapter[0], tenant=tenant
        )
        try:
            self.engine.add(request)
        except (ContextLengthExceeded, Overloaded):
            return
        self.records[request.request_id] = Record(request, adapter_path=adapter[1])
        self.adapter_of[number] = adapter[1]
        if poisoned:
            # The first position that is computed after an answer, or the last before an embedding.
            self.fails_at.add((number, len(token_ids) - (sampling.pooling is not None)))

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(self.engine.step())
            self.engine.check_integrity()
            self.check_plans()
            self.check_adapters()

    @rule(name=st.sampled_from("abc"), broken=st.sampled_from([False, False, True]))
    def load_adapter(self, name: str, broken: bool) -> None:
        path = f"{name}-{len(self.loads)}"
        try:
            self.loads.append((path, self.engine.load_adapter(name, path)))
        except AdapterError:
            return
        if broken:
            self.broken_adapters.add(path)

    @rule(name=st.sampled_from("abc"))
    def unload_adapter(self, name: str) -> None:
        paths = [info.path for info in self.engine.adapters if info.name == name]
        if not paths:
            with pytest.raises(AdapterError):
                self.engine.unload_adapter(name)
            return
        self.unloads.append((paths[0], self.engine.unload_adapter(name)))
        assert name not in [info.name for info in self.engine.adapters]

    @precondition(lambda self: self.engine.adapters)
    @rule(data=st.data())
    def adapter_breaks(self, data: st.DataObject) -> None:
        """Its file is gone or another: when the gang forms anew, it cannot be loaded again."""
        self.broken_adapters.add(data.draw(st.sampled_from(self.engine.adapters)).path)

    def check_adapters(self) -> None:
        used = {record.adapter_path for record in self.records.values() if record.finish is None}
        assert not used & {path for path, future in self.unloads if future.done()}, "unloaded while a request has it"

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.live()))
        if request_id not in self.engine._states and not self.records[request_id].aborted:
            assert not self.engine.abort(request_id), "it has ended; the next step says so"
            return
        if self.records[request_id].aborted:
            assert not self.engine.abort(request_id)
        assert self.engine.abort(request_id) != self.records[request_id].aborted
        self.records[request_id].aborted = True
        self.engine.check_integrity()

    @precondition(lambda self: self.live())
    @rule()
    def gang_dies(self) -> None:
        self.gang.close()
        try:
            self.take(self.engine.step())
            died = False
        except RankFailure:
            died = True
        if died:
            for request_id in self.live():
                self.records[request_id].num_deaths += 1
            with pytest.raises(EngineFailure, match="reset"):
                self.engine.step()
        self.epoch += 1
        self.gang = self.new_gang()
        self.engine.reset(self.epoch, executor=self.gang)
        self.engine.check_integrity()

    def take(self, outputs: Outputs) -> None:
        for output in outputs:
            record = self.records[output.request_id]
            assert record.finish is None, f"{output.request_id} went on after its end"
            record.token_ids += output.token_ids
            record.prompt_logprobs += output.prompt_logprobs or []
            if output.finish_reason is not None:
                record.finish = output
                self.check_end(record)

    def check_plans(self) -> None:
        for plan in self.gang.plans:
            for batch in plan.batches:
                num_decodes = len(unpack(batch.decodes))
                assert batch.num_tokens <= self.config.max_num_batched_tokens
                assert num_decodes + len(batch.scheduled) <= self.config.max_num_seqs
                if not self.input_references:
                    assert not batch.decodes
                    assert all(share.input_step == NO_STEP for share in batch.scheduled)
        self.gang.plans.clear()

    def check_end(self, record: Record) -> None:
        request, finish = record.request, record.finish
        assert finish is not None
        sampling = request.sampling
        expected = sequential_tokens(sampling, request.token_ids, request.num_prompt_tokens, VOCAB_SIZE)
        assert record.token_ids == expected[: len(record.token_ids)], "the tokens depend on what else was computed"
        if record.aborted:
            assert finish.finish_reason == FinishReason.ABORT and not finish.token_ids
        elif finish.error == "the request's adapter could not be loaded again":
            assert record.adapter_path in self.broken_adapters
        elif (finish.error or "").startswith("the gang broke"):
            assert record.num_deaths >= SUSPECT_AFTER and not finish.token_ids
        elif (finish.error or "").startswith("its other choice"):
            culprit = self.records[(finish.error or "").split()[3]]
            assert culprit.finish is not None and (culprit.finish.error or "").startswith("the gang broke")
            assert culprit.request.sampling.seed == sampling.seed and not finish.token_ids
        elif finish.finish_reason == FinishReason.ERROR:
            assert sampling.seed in {seed for seed, _ in self.fails_at}
            assert finish.error == f"position {len(request.token_ids) - (sampling.pooling is not None)} is not a number"
        elif sampling.pooling is not None:
            assert (finish.finish_reason, finish.token_ids) == (FinishReason.STOP, [])
            assert finish.pooled == embedding_of(sampling.pooling, request.token_ids), "not of every position, once"
        else:
            assert record.token_ids == expected
            assert all((sampling.seed, p) not in self.fails_at for p in range(len(request.token_ids + expected) - 1))
            stopped = finish.finish_reason == FinishReason.STOP
            assert stopped == (
                expected[-1] in sampling.stop_token_ids
                and len(request.token_ids) + len(expected) - request.num_prompt_tokens > sampling.min_tokens
            )
            assert finish.stop_token_id == (expected[-1] if stopped else None)
            if sampling.prompt_logprobs is not None:
                positions = range(1, request.num_prompt_tokens)
                assert record.prompt_logprobs == [None, *(logprobs_at(request.token_ids, p) for p in positions)]
        if sampling.prompt_logprobs is None:
            assert not record.prompt_logprobs

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # No request needs more steps than it has tokens, even if all run one after another and are begun anew often.
        for _ in range(4 * MAX_MODEL_LEN * (len(self.records) + 1) * self.depth):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert not self.engine.has_work, "requests starve"
        assert not self.live(), "a request has no end"
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.num_blocks_used, stats.num_running, stats.num_waiting, stats.num_in_flight) == (0, 0, 0, 0)
        for path, loaded in self.loads:
            assert loaded.exception(timeout=0) is None or path in self.broken_adapters
        assert all(unloaded.done() for _, unloaded in self.unloads)
        assert sorted(self.gang.adapters.values()) == sorted(info.path for info in self.engine.adapters)
        assert all(info.num_bytes > 0 for info in self.engine.adapters)


FIELDS = SamplingParams.__struct_fields__


def machine(depth: int, input_references: bool, examples: int) -> type:
    name = f"Depth{depth}{'' if input_references else 'WithoutReferences'}"
    case = type(name, (StepProtocolMachine,), {"depth": depth, "input_references": input_references}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=30)
    return case


TestDepth1 = machine(1, True, 80)
TestDepth2 = machine(2, True, 80)
TestDepth3 = machine(3, True, 60)
TestDepth4 = machine(4, True, 80)
TestDepth2WithoutReferences = machine(2, False, 40)
TestDepth3WithoutReferences = machine(3, False, 60)
TestDepth4WithoutReferences = machine(4, False, 40)


@pytest.mark.full
class TestManyExamplesDepth1(machine(1, True, 600)): ...


@pytest.mark.full
class TestManyExamplesDepth2(machine(2, True, 600)): ...


@pytest.mark.full
class TestManyExamplesDepth3(machine(3, False, 600)): ...


@pytest.mark.full
class TestManyExamplesDepth4(machine(4, True, 600)): ...
