"""Whom a culprit takes with it. The whole of it is in tests/property/test_step_protocol.py and in the simulation."""

from engine.request import Request, SamplingParams
from engine.scheduler.break_trials import BreakTrials
from engine.scheduler.request_state import RequestState


def _state(name: str, prompt: list[int], seed: int, choice: int = 0, adapter: int = -1) -> RequestState:
    sampling = SamplingParams(9, seed=seed, choice=choice)
    return RequestState.of(Request(name, prompt, len(prompt), sampling), 0, adapter=adapter)


def test_the_choices_of_a_request_are_known_by_prompt_and_seed() -> None:
    culprit, choice = _state("a.0", [1, 2], 7), _state("a.1", [1, 2], 7, choice=1)
    choice.token_ids += [3, 4]
    others = [_state("b", [1, 2], 8), _state("c", [1, 3], 7), _state("d", [1, 2], 7, adapter=0)]
    assert BreakTrials.choices_beside(culprit, [*others, choice]) == [choice]
