"""The path under both APIs, against scripted backends: what goes to the engine and what comes back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelNotFound
from cluster.frontend.calls import (
    ChatPrompt,
    Delta,
    Echo,
    Event,
    Finished,
    SamplingOptions,
    Started,
    TextPrompt,
    TimeLimits,
    TokenPrompt,
    Usage,
)
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    RemudaError,
)
from engine.request import FinishReason
from tests.frontend.scripted import Gate, says
from tests.frontend.service_bed import Build, call, events_of, text_of


async def test_one_choice_from_start_to_usage(build: Build, tiny: Tokenizer) -> None:
    ids = tiny.encode(" General Kenobi", add_special_tokens=False)
    service, backend, clock = build(says(ids, stop_token_id=2036, num_cached_tokens=2))
    events = await events_of(service, call())
    assert isinstance(events[0], Started)
    assert events[0].prompt_token_ids == [backend.requests[0].token_ids]
    assert text_of(events) == " General Kenobi"
    assert events[-2] == Finished(0, FinishReason.STOP, None, 2036)
    assert events[-1] == Usage(len(backend.requests[0].token_ids), len(ids) + 1, 2)
    assert sum(isinstance(event, Finished) for event in events) == 1
    assert backend.live == set()
    assert clock.num_armed == 0
    assert service.admission.num_requests == 0


async def test_n_choices_are_requests_that_differ_in_choice_only(build: Build) -> None:
    service, backend, _ = build(says([300, 301], stop_token_id=2036))
    events = await events_of(service, call(n=3))
    assert [request.request_id for request in backend.requests] == ["q.0", "q.1", "q.2"]
    assert [request.sampling.choice for request in backend.requests] == [0, 1, 2]
    assert {request.sampling.seed for request in backend.requests} == {1000}
    assert {tuple(request.token_ids) for request in backend.requests} == {tuple(backend.requests[0].token_ids)}
    assert sorted(event.choice for event in events if isinstance(event, Finished)) == [0, 1, 2]
    usage = events[-1]
    assert isinstance(usage, Usage)
    assert usage.num_prompt_tokens == len(backend.requests[0].token_ids)
    assert usage.num_completion_tokens == 9


async def test_several_prompts_number_their_choices_prompt_by_prompt(build: Build) -> None:
    service, backend, _ = build(says([300]))
    prompts = [TextPrompt("a"), TokenPrompt([7, 8, 9])]
    events = await events_of(service, call(prompts=prompts, n=2))
    assert [request.sampling.choice for request in backend.requests] == [0, 1, 0, 1]
    assert [request.sampling.seed for request in backend.requests] == [1000, 1000, 1001, 1001]
    assert backend.requests[2].token_ids == [7, 8, 9]
    assert sorted(event.choice for event in events if isinstance(event, Finished)) == [0, 1, 2, 3]
    usage = events[-1]
    assert isinstance(usage, Usage)
    assert usage.num_prompt_tokens == len(backend.requests[0].token_ids) + 3


async def test_defaults_come_from_the_checkpoint(build: Build, model_paths: dict[str, Path]) -> None:
    files = read_model_files(model_paths["tiny"])
    service, backend, _ = build(says([300]))
    await events_of(service, call())
    sampling = backend.requests[0].sampling
    assert sampling.temperature == files.sampling_defaults["temperature"]
    assert sampling.top_p == files.sampling_defaults["top_p"]
    assert sampling.stop_token_ids == files.eos_ids
    assert sampling.max_tokens == 512 - len(backend.requests[0].token_ids)
    options = SamplingOptions(temperature=0.0, top_k=-1, ignore_eos=True, stop_token_ids=[5], seed=-3, max_tokens=4)
    await events_of(service, call(options=options))
    sampling = backend.requests[1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.0, 0, -3, 4)
    assert sampling.stop_token_ids == (5,)


async def test_what_arrives_together_is_one_delta(build: Build) -> None:
    service, _, _ = build(says([300, 301, 302, 303], sizes=[4]))
    events = await events_of(service, call())
    assert [event.token_ids for event in events if isinstance(event, Delta)] == [[300, 301, 302, 303]]


@pytest.mark.parametrize("num_turns", [1, 2, 3, 5, 50])
async def test_a_slow_reader_loses_nothing(num_turns: int, build: Build) -> None:
    """What arrives while the reader is busy with one event, the end included, comes with the next ones."""
    wanted = list(range(300, 320))
    service, _, _ = build(says(wanted))
    events = []
    async for event in service.generate(call()):
        events.append(event)
        for _ in range(num_turns):
            await asyncio.sleep(0)
    assert [token for event in events if isinstance(event, Delta) for token in event.token_ids] == wanted
    assert [type(event) for event in events[-2:]] == [Finished, Usage]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_turns", [1, 2, 5])
async def test_a_slow_reader_misses_nothing_and_hears_the_end_once(n: int, num_turns: int, build: Build) -> None:
    """While the reader is busy with one event, the choices go on and end."""
    ids = list(range(300, 340))
    service, _, _ = build(says(ids))
    events: list[Event] = []
    async for event in service.generate(call(n=n)):
        events.append(event)
        for _ in range(num_turns):
            await asyncio.sleep(0)
    for choice in range(n):
        own = [event for event in events if isinstance(event, Delta | Finished) and event.choice == choice]
        assert [token_id for event in own if isinstance(event, Delta) for token_id in event.token_ids] == ids
        assert [isinstance(event, Finished) for event in own].index(True) == len(own) - 1
    assert isinstance(events[-1], Usage)


async def test_a_stop_string_stops_the_engine_too(build: Build, tiny: Tokenizer) -> None:
    ids = tiny.encode(" one two three four", add_special_tokens=False)
    gate = Gate(before=ids)
    service, backend, _ = build(gate)
    events = await events_of(service, call(stop=["two"]))
    assert text_of(events) == " one "
    assert events[-2] == Finished(0, FinishReason.STOP, stop_string="two")
    assert backend.aborted == ["q.0"]


async def test_echo_gives_the_prompt_first(build: Build) -> None:
    service, _, _ = build(says([300]))
    events = await events_of(service, call(echo=True))
    assert [type(event) for event in events] == [Started, Echo, Delta, Finished, Usage]
    assert text_of(events).startswith("Hello there")


async def test_scoring_generates_nothing(build: Build) -> None:
    service, backend, _ = build(says([300, 301]))
    options = SamplingOptions(max_tokens=0, logprobs=1, prompt_logprobs=1)
    events = await events_of(service, call(TokenPrompt([11, 12, 13]), options=options, echo=True))
    echo = next(event for event in events if isinstance(event, Echo))
    assert echo.logprobs is not None
    assert [entry and entry.logprob for entry in echo.logprobs] == [None, -0.012, -0.013]
    assert not any(isinstance(event, Delta) for event in events)
    assert events[-2] == Finished(0, FinishReason.LENGTH)
    assert events[-1] == Usage(3, 0, 0)
    assert backend.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "other"}, ModelNotFound, None),
        ({"prompts": []}, InvalidRequest, "prompt"),
        ({"prompt": TokenPrompt([])}, InvalidRequest, "prompt"),
        ({"prompt": TextPrompt("", add_special_tokens=False)}, InvalidRequest, "prompt"),
        ({"prompt": TokenPrompt([1, 2048])}, InvalidRequest, "prompt"),
        ({"prompt": TokenPrompt([-1])}, InvalidRequest, "prompt"),
        ({"prompt": TokenPrompt([5] * 512)}, ContextLengthExceeded, "prompt"),
        ({"prompt": TextPrompt("word " * 600)}, ContextLengthExceeded, "prompt"),
        ({"prompt": TextPrompt("x" * 10_000_000)}, ContextLengthExceeded, "prompt"),
        (
            {"prompt": TokenPrompt([5] * 500), "options": SamplingOptions(max_tokens=13)},
            ContextLengthExceeded,
            "prompt",
        ),
        ({"prompt": ChatPrompt([{"role": "user", "content": [{"type": "x"}]}])}, InvalidRequest, "messages"),
        ({"n": 0}, InvalidRequest, "n"),
        ({"n": 129}, InvalidRequest, "n"),
        ({"n": 9}, InvalidRequest, "n"),
        ({"stop": ["x"] * 17}, InvalidRequest, "stop"),
        ({"stop": [""]}, InvalidRequest, "stop"),
        ({"options": SamplingOptions(max_tokens=0)}, InvalidRequest, "max_tokens"),
        ({"options": SamplingOptions(max_tokens=-1)}, InvalidRequest, "max_tokens"),
        ({"options": SamplingOptions(temperature=-0.1)}, InvalidRequest, "temperature"),
        ({"options": SamplingOptions(temperature=float("nan"))}, InvalidRequest, "temperature"),
        ({"options": SamplingOptions(top_p=1.1)}, InvalidRequest, "top_p"),
        ({"options": SamplingOptions(logprobs=21)}, InvalidRequest, "logprobs"),
        ({"options": SamplingOptions(logit_bias={2048: 1.0})}, InvalidRequest, "logit_bias"),
        ({"options": SamplingOptions(stop_token_ids=[2048])}, InvalidRequest, "stop_token_ids"),
        ({"options": SamplingOptions(min_tokens=5, max_tokens=4)}, InvalidRequest, "min_tokens"),
        ({"options": SamplingOptions(seed=2**63)}, InvalidRequest, "seed"),
        ({"limits": TimeLimits(total_s=0.0)}, InvalidRequest, "timeout_s"),
    ],
)
async def test_bad_requests_are_refused_before_any_work(
    changes: dict[str, Any], error: type[RemudaError], param: str | None, build: Build
) -> None:
    service, backend, _ = build(says([300]))
    with pytest.raises(error) as caught:
        await events_of(service, call(changes.pop("prompt", None), **changes))
    assert getattr(caught.value, "param", None) == param
    assert type(caught.value) is error
    assert backend.requests == []
    assert service.admission.num_requests == 0


async def test_too_long_names_both_numbers(build: Build) -> None:
    service, _, _ = build(says([300]))
    with pytest.raises(ContextLengthExceeded, match=r"512 tokens, but 513 were requested \(500 in the prompt, 13 in"):
        await events_of(service, call(TokenPrompt([5] * 500), options=SamplingOptions(max_tokens=13)))
    with pytest.raises(ContextLengthExceeded, match="512 tokens, but the prompt alone has 600"):
        await events_of(service, call(TokenPrompt([5] * 600)))


async def test_default_max_tokens_gives_way_to_a_long_prompt(build: Build) -> None:
    service, backend, _ = build(says([300]))
    await events_of(service, call(TokenPrompt([5] * 500), default_max_tokens=16))
    await events_of(service, call(TokenPrompt([5] * 400), default_max_tokens=16))
    assert [request.sampling.max_tokens for request in backend.requests] == [12, 16]
