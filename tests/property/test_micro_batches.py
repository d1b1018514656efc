"""Pipeline micro-batches: the rule alone, and the scheduler that follows it, with real plans and results."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import BatchPlan, SampledToken, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.micro_batch import Work
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler


@given(st.integers(0, 300), st.integers(1, 9), st.data())
def test_free_plans_share_out_all_that_is_ready(num_ready: int, num_plans: int, data: st.DataObject) -> None:
    """Where all plans are free nobody is left over, and no two plans differ by more than one request."""
    num_prompt_tokens = data.draw(st.integers(0, 10000))
    shares, left = [], num_ready
    for num_in_flight in range(num_plans):
        shares.append(Work(num_ready, left, num_prompt_tokens, num_plans, 512).max_decodes(num_in_flight))
        left -= shares[-1]
    assert left == 0 and max(shares) - min(shares) <= 1


@given(st.integers(0, 100000), st.integers(1, 9), st.integers(1, 10000))
def test_prompts_are_cut_into_chunks_that_are_worth_it(num_tokens: int, num_plans: int, max_num_tokens: int) -> None:
    share = Work(0, 0, num_tokens, num_plans, max_num_tokens).max_prompt_tokens
    assert share >= max(64, max_num_tokens // 16)
    assert share * 2 * num_plans >= num_tokens
    assert share <= max(64, max_num_tokens // 16, num_tokens // (2 * num_plans) + 1)


class Pipeline:
    """A scheduler whose plans return in order, the oldest first; counts what each request got."""

    def __init__(self, depth: int, max_num_seqs: int) -> None:
        config = SchedulerConfig(max_num_seqs, max_num_batched_tokens=256, depth=depth)
        cache = CacheConfig(block_size=4, num_blocks=4000, keeps_prefixes=False)
        self.scheduler = Scheduler(config, cache, (KvGroupConfig((0,)),), input_references=False)
        self.depth = depth
        self.plans: deque[tuple[int, BatchPlan]] = deque()
        self.num_steps = 0

    def add(self, number: int, num_prompt_tokens: int, max_tokens: int) -> None:
        request = Request(f"r{number}", [7] * num_prompt_tokens, num_prompt_tokens, SamplingParams(max_tokens))
        self.scheduler.add(RequestState.of(request, number, dp_group=0))

    def fill(self) -> None:
        while len(self.plans) < self.depth and (batch := self.scheduler.schedule(self.num_steps)) is not None:
            self.plans.append((self.num_steps, batch))
            self.num_steps += 1
            self.scheduler.check_integrity()

    def take(self) -> None:
        step, batch = self.plans.popleft()
        sampled = [SampledToken(share.slot, 5) for share in batch.scheduled if share.sample]
        self.scheduler.update(StepResult(0, step, 0, sampled))
        self.scheduler.check_integrity()

    def decodes(self) -> list[list[int]]:
        return [[share.slot for share in batch.scheduled if share.num_tokens == 1] for _, batch in self.plans]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.lists(st.integers(2, 300), min_size=1, max_size=14))
def test_decoding_requests_are_spread_evenly_whenever_they_came(depth: int, prompts: list[int]) -> None:
    """Whatever order prompts end in: soon every plan holds its share, and every request is in one of them."""
    pipeline = Pipeline(depth, max_num_seqs=14)
    for number, num_prompt_tokens in enumerate(prompts):
        pipeline.add(number, num_prompt_tokens, max_tokens=10000)
        pipeline.fill()
        pipeline.take()
    for _ in range(2 * depth + sum(prompts) // 64 + len(prompts)):
        pipeline.fill()
        pipeline.take()
    for _ in range(3 * depth):
        pipeline.fill()
        in_flight = pipeline.decodes()
        slots = sorted(slot for plan in in_flight for slot in plan)
        assert len(set(slots)) == len(slots) == len(prompts), "each request decodes in one plan in flight"
        sizes = [len(plan) for plan in in_flight]
        assert len(sizes) == min(depth, len(prompts)) and max(sizes) == -(-len(prompts) // depth)
        pipeline.take()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(1, 400), st.integers(1, 30)), min_size=1, max_size=20))
def test_everybody_gets_to_the_end(depth: int, requests: list[tuple[int, int]]) -> None:
    pipeline = Pipeline(depth, max_num_seqs=6)
    for number, (num_prompt_tokens, max_tokens) in enumerate(requests):
        pipeline.add(number, num_prompt_tokens, max_tokens)
    for _ in range(sum(num_prompt // 16 + most + 2 for num_prompt, most in requests) * depth):
        pipeline.fill()
        if not pipeline.plans:
            break
        pipeline.take()
    assert pipeline.scheduler.num_running == pipeline.scheduler.num_waiting == pipeline.scheduler.num_blocks_used == 0


def test_a_long_prompt_is_in_all_plans_at_once() -> None:
    """So all stages work on it, and requests that decode go on in each."""
    pipeline = Pipeline(depth=3, max_num_seqs=8)
    for number in range(3):
        pipeline.add(number, 2, max_tokens=100)
    pipeline.fill()
    pipeline.take()
    pipeline.add(3, 480, max_tokens=100)
    pipeline.fill()
    chunks = [[share.num_tokens for share in batch.scheduled] for _, batch in pipeline.plans]
    assert chunks == [[1, 80], [1, 67], [1, 64]]
