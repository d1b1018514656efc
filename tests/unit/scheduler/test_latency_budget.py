"""What prompts may cost the requests that decode, learnt from the durations of steps."""

import itertools
from dataclasses import dataclass

import pytest

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import BatchPlan, SampledToken, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.latency_budget import LatencyBudget, TokenBudget
from engine.scheduler.prompt_costs import PromptCosts
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler


def num_prompt_tokens(budget: LatencyBudget, num_decodes: int, position: int = 0) -> int:
    return budget.of_step(2048, num_decodes).prompt_tokens(position)


def test_prompts_alone_are_not_bounded() -> None:
    budget = LatencyBudget(3.0)
    budget.observe(4, [], 0.1)
    assert num_prompt_tokens(budget, 0) == 2048


def test_what_is_not_known_is_found_out_without_a_long_step() -> None:
    budget = LatencyBudget(3.0)
    assert num_prompt_tokens(budget, 4) == 2048, "nobody measures"
    budget.observe(0, [(0, 10)], 0.1)
    assert num_prompt_tokens(budget, 4) == 0, "one step decodes alone"
    budget.observe(4, [], 0.1)
    assert num_prompt_tokens(budget, 4) == 16, "and the first prompt begins with little"
    budget.observe(4, [(0, 16)], 0.116)
    assert num_prompt_tokens(budget, 4) == 200


@pytest.mark.parametrize(("stretch", "expected"), [(3.0, 200), (2.0, 100), (1.0, 16)])
def test_the_stretch_decides(stretch: float, expected: int) -> None:
    budget = LatencyBudget(stretch)
    for _ in range(50):
        budget.observe(4, [], 0.1)
        budget.observe(4, [(0, 100)], 0.2)
    assert num_prompt_tokens(budget, 4) == pytest.approx(expected, abs=1)


def test_a_prompt_gets_16_tokens_of_a_step_however_dear_they_are() -> None:
    """With the factor that is served with: the gap then is longer than it. A second prompt gets none of such a step."""
    budget = LatencyBudget(SchedulerConfig().max_step_stretch)
    assert SchedulerConfig().max_step_stretch == 5.0, "as docs/guide.md says"
    for _ in range(50):
        budget.observe(4, [], 0.001)
        budget.observe(4, [(0, 100)], 0.101)
    step = budget.of_step(2048, 4)
    assert step.prompt_tokens(0) == 16, "four would take as long as may be"
    step.take(16, 0)
    assert step.prompt_tokens(0) == 0
    durations, num_steps = run(5.0, decode_s=0.001, token_s=0.001)
    assert max(durations) == pytest.approx(0.001 + 16 * 0.001) and max(durations) > 5 * 0.001
    assert num_steps <= 4000 / 16 * 1.05 + 3, "it gets on"


def test_how_long_decoding_takes_is_looked_at_again() -> None:
    budget = LatencyBudget(3.0)
    budget.observe(4, [], 0.1)
    budget.observe(4, [(0, 100)], 0.2)
    for _ in range(6):
        budget.observe(4, [(0, 100)], 0.2)
    assert num_prompt_tokens(budget, 6) > 0
    budget.observe(64, [(0, 100)], 0.5)
    assert num_prompt_tokens(budget, 64) == 0, "another number of requests decodes"
    assert num_prompt_tokens(budget, 64) > 0, "only one step is asked for"
    budget.observe(64, [], 0.4)
    assert budget.of_step(2048, 64).seconds_left == pytest.approx(0.8)


def test_unmeasured_steps_teach_nothing() -> None:
    budget = LatencyBudget(3.0)
    budget.observe(4, [], 0.0)
    assert num_prompt_tokens(budget, 4) == 2048


def test_both_bounds_of_a_step_count() -> None:
    budget = TokenBudget(10, 4)
    budget.take(1, 0)
    assert (budget.left, budget.for_prompts) == (9, 4)
    budget.take(3, 0)
    assert (budget.left, budget.for_prompts, budget.prompt_tokens(0)) == (6, 1, 1)
    assert TokenBudget(5, None).for_prompts == 5


def test_time_is_shared_by_prompts_at_their_own_prices() -> None:
    costs = PromptCosts()
    costs.observe([(0, 100)], 0.1)
    costs.observe([(100_000, 100)], 0.4)
    budget = TokenBudget(2048, None, seconds_left=0.3, costs=costs)
    assert (budget.prompt_tokens(0), budget.prompt_tokens(100_000)) == (300, 75)
    budget.take(50, 100_000)
    assert [budget.prompt_tokens(0), budget.prompt_tokens(100_000)] == pytest.approx([100, 25], abs=1)
    budget.take(100, 0)
    assert budget.prompt_tokens(0) == 0


def test_a_position_never_seen_is_taken_for_as_dear_as_it_can_be() -> None:
    costs = PromptCosts()
    costs.observe([(500, 100)], 0.1)
    assert costs.at(100_000) == pytest.approx(0.001 * 2**7)
    costs.observe([(3000, 100)], 0.2)
    assert costs.at(100_000) == pytest.approx(0.002 * 2**5), "the nearer the better known"
    assert costs.at(1500) == pytest.approx(0.002), "what is farther costs no less"


def run(stretch: float, decode_s: float, token_s: float) -> tuple[list[float], int]:
    """A request decodes while a prompt of 4,000 tokens comes: the durations of the steps until the prompt is through,
    as a model that takes so long would need, and how many they were."""
    config = SchedulerConfig(4, 2048, 8192, max_step_stretch=stretch)
    scheduler = Scheduler(config, CacheConfig(16, 1000), (KvGroupConfig((0,)),))

    def add(name: str, num_tokens: int, max_tokens: int) -> RequestState:
        request = Request(name, [int(name)] * num_tokens, num_tokens, SamplingParams(max_tokens))
        state = RequestState.of(request, int(name), 0)
        scheduler.add(state)
        return state

    def step(number: int) -> float:
        batch = scheduler.schedule(number)
        assert batch is not None
        num_prompt_tokens = sum(share.num_tokens for share in batch.scheduled if share.num_tokens > 1)
        duration_s = decode_s + token_s * num_prompt_tokens
        sampled = [SampledToken(slot, 7) for slot in batch.sampling_slots]
        scheduler.update(StepResult(0, number, 0, sampled, duration_us=int(duration_s * 1e6)))
        return duration_s

    add("0", 10, 1000)
    for number in range(20):
        step(number)
    late = add("1", 4000, 5)
    durations, number = [], 20
    while late.num_computed < 4000:
        durations.append(step(number))
        number += 1
    return durations, len(durations)


def test_a_long_prompt_stretches_the_others_gap_by_the_stated_factor_at_most() -> None:
    durations, num_steps = run(3.0, decode_s=0.1, token_s=0.001)
    assert max(durations) <= 3.0 * 0.1 * 1.02
    assert num_steps <= 4000 / 200 + 3, "and does not take smaller bites than it may"


def test_a_generous_factor_lets_prompts_through() -> None:
    assert run(1000.0, decode_s=0.1, token_s=0.001)[1] <= 4


@dataclass(frozen=True)
class Model:
    """How long a step takes: ``decode_s``, and for each prompt token ``token_s`` and ``pair_s`` for every position
    before it, as attention does."""

    decode_s: float
    token_s: float
    pair_s: float

    def of(self, batch: BatchPlan) -> float:
        return self.decode_s + sum(
            share.num_tokens * (self.token_s + self.pair_s * (share.start + share.num_tokens / 2))
            for share in batch.scheduled
            if share.num_tokens > 1
        )


LONG = [3] * 100_000


@pytest.mark.parametrize("num_before", [1, 2, 30], ids=["at once", "at the second step", "later"])
@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        (Model(0.01, 1e-4, 0.0), [[1] * 32_000]),
        (Model(0.01, 1e-4, 1e-8), [[1] * 32_000]),
        (Model(0.01, 2e-5, 2e-9), [[1] * 128_000]),
        (Model(0.01, 1e-3, 0.0), [[1] * 32_000]),
        (Model(0.01, 2e-5, 2e-9), [*([index] * 500 for index in range(10, 20)), LONG + [5] * 20_000]),
    ],
    ids=["no attention", "32k", "128k", "slow", "short ones, then far into a known prefix"],
)
def test_whatever_a_prompt_costs_the_gap_keeps_to_the_factor(
    model: Model, prompts: list[list[int]], num_before: int
) -> None:
    """Eight requests decode under a virtual clock."""
    config = SchedulerConfig(16, 2048, 2**18, max_step_stretch=3.0)
    scheduler = Scheduler(config, CacheConfig(16, 20_000), (KvGroupConfig((0,)),))
    gaps: list[float] = []
    states: list[RequestState] = []
    step = itertools.count()

    def add(token_ids: list[int], max_tokens: int) -> RequestState:
        request = Request(f"r{len(states)}", token_ids, len(token_ids), SamplingParams(max_tokens))
        states.append(RequestState.of(request, len(states), 0))
        scheduler.add(states[-1])
        return states[-1]

    def run() -> None:
        number = next(step)
        batch = scheduler.schedule(number)
        assert batch is not None
        duration_s = model.of(batch)
        if batch.decodes or any(share.num_tokens == 1 for share in batch.scheduled):
            gaps.append(duration_s)
        sampled = [SampledToken(slot, 7) for slot in batch.sampling_slots]
        scheduler.update(StepResult(0, number, 0, sampled, duration_us=round(duration_s * 1e6)))

    first = add(LONG, 1)
    while not first.finished:
        run()
    for index in range(8):
        add([100 + index] * 50, 100_000)
    for _ in range(num_before):
        run()
    prompt_s = 0.0
    for token_ids in prompts:
        late = add(token_ids, 2)
        while late.num_generated == 0:
            run()
        known = late.num_cached_tokens
        prompt_s += sum(model.token_s + model.pair_s * position for position in range(known, len(token_ids)))
    assert max(gaps) <= 3.0 * 1.06 * model.decode_s
    # Prompts get what they may have: two thirds of nearly every step.
    assert sum(gaps) <= prompt_s * 1.5 * 1.25 + (num_before + 40) * model.decode_s
