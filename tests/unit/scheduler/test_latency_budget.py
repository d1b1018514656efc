"""What prompts may cost the requests that decode, learnt from the durations of steps."""

import pytest

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.messages import SampledToken, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.latency_budget import LatencyBudget, TokenBudget
from engine.scheduler.request_state import RequestState
from engine.scheduler.scheduler import Scheduler


def test_prompts_alone_are_not_bounded() -> None:
    budget = LatencyBudget(3.0)
    budget.observe(4, 0, 0.1)
    assert budget.num_prompt_tokens(0) is None


def test_nothing_is_known_at_first() -> None:
    budget = LatencyBudget(3.0)
    assert budget.num_prompt_tokens(4) is None
    budget.observe(4, 0, 0.1)
    assert budget.num_prompt_tokens(4) == 128


@pytest.mark.parametrize(("stretch", "expected"), [(3.0, 200), (2.0, 100), (1.0, 16)])
def test_the_stretch_decides(stretch: float, expected: int) -> None:
    budget = LatencyBudget(stretch)
    for _ in range(50):
        budget.observe(4, 0, 0.1)
        budget.observe(4, 100, 0.2)
    assert budget.num_prompt_tokens(4) == pytest.approx(expected, abs=1)


def test_unmeasured_steps_teach_nothing() -> None:
    budget = LatencyBudget(3.0)
    budget.observe(4, 0, 0.0)
    assert budget.num_prompt_tokens(4) is None


def test_both_bounds_of_a_step_count() -> None:
    budget = TokenBudget(10, 4)
    budget.take(1)
    assert (budget.left, budget.for_prompts) == (9, 4)
    budget.take(3)
    assert (budget.left, budget.for_prompts) == (6, 1)
    assert TokenBudget(5, None).for_prompts == 5


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
        sampled = [SampledToken(share.slot, 7) for share in batch.scheduled if share.sample]
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
    # The first chunk, taken while nothing was known, is 128 tokens; what follows keeps to the factor.
    assert max(durations) <= 3.0 * 0.1 * 1.02
    assert num_steps <= 4000 / 200 + 3, "and does not take smaller bites than it may"


def test_a_generous_factor_lets_prompts_through() -> None:
    assert run(1000.0, decode_s=0.1, token_s=0.001)[1] <= 4
