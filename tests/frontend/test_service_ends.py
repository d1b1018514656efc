"""How requests end: overload, drain, deadlines, failures, and clients that leave."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from cluster.errors import Cancelled, DeadlineExceeded, Draining, ModelNotFound, Unavailable
from cluster.frontend.calls import (
    Call,
    Delta,
    Event,
    TextPrompt,
    TimeLimits,
    Usage,
)
from cluster.frontend.service import Service
from cluster.frontend.tokenizer import Tokenizer
from cluster.types import ReplicaState
from engine.errors import (
    EngineFailure,
    InvalidRequest,
    Overloaded,
    RankFailure,
    RemudaError,
)
from engine.request import FinishReason, Output, Request
from tests.frontend.scripted import Gate, replica_info, says
from tests.frontend.service_bed import Build, call, events_of


async def test_a_full_server_says_so_and_recovers(build: Build) -> None:
    gate = Gate(after=[300])
    service, backend, _ = build(gate, max_live=2)
    first = asyncio.create_task(events_of(service, call(n=2)))
    await backend.until(lambda: len(backend.live) == 2)
    with pytest.raises(Overloaded):
        await events_of(service, Call(request_id="q2", prompts=[TextPrompt("a")]))
    gate.opened.set()
    await first
    assert isinstance((await events_of(service, call()))[-1], Usage)


async def test_a_draining_server_finishes_what_it_has(build: Build) -> None:
    gate = Gate(after=[300])
    service, backend, _ = build(gate)
    running = asyncio.create_task(events_of(service, call()))
    await backend.until(lambda: bool(backend.live))
    service.admission.close()
    with pytest.raises(Draining):
        await events_of(service, Call(request_id="q2", prompts=[TextPrompt("a")]))
    gate.opened.set()
    assert isinstance((await running)[-1], Usage)
    await asyncio.wait_for(service.admission.wait_idle(), 5)


async def test_no_ready_replica_is_unavailable(build: Build) -> None:
    service, backend, _ = build(says([300]))
    backend.infos = [replica_info(ReplicaState.STARTING)]
    with pytest.raises(Unavailable):
        await events_of(service, call())


@pytest.mark.parametrize("num_events", [1, 2, 3])
async def test_leaving_stops_all_choices(num_events: int, build: Build) -> None:
    service, backend, clock = build(Gate(before=[300, 301]), limits=TimeLimits(60, 60, 60))
    async with aclosing(service.generate(call(n=3))) as events:
        for _ in range(num_events):
            await anext(events)
    assert backend.live == set()
    assert len(backend.aborted) == len(backend.requests)
    assert clock.num_armed == 0
    assert service.admission.num_requests == 0


async def test_cancelling_the_reader_stops_all_choices(build: Build) -> None:
    service, backend, _ = build(Gate(before=[300]))
    reader = asyncio.create_task(events_of(service, call(n=2)))
    await backend.until(lambda: len(backend.live) == 2)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert backend.live == set()
    assert sorted(backend.aborted) == ["q.0", "q.1"]


async def test_one_failed_choice_ends_the_request_and_the_others(build: Build) -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300])
        if request.sampling.choice == 1:
            raise RankFailure("rank 3 died", 3)
        await asyncio.Event().wait()

    service, backend, _ = build(script)
    with pytest.raises(RankFailure):
        await events_of(service, call(n=3))
    assert backend.live == set()


@pytest.mark.parametrize(("reason", "error"), [(FinishReason.ERROR, EngineFailure), (FinishReason.ABORT, Unavailable)])
async def test_an_end_that_is_no_answer_is_an_error(
    reason: FinishReason, error: type[RemudaError], build: Build
) -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [], reason, error="out of luck")

    service, _, _ = build(script)
    with pytest.raises(error):
        await events_of(service, call())


async def test_a_stream_that_just_ends_is_an_error(build: Build) -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300])

    service, _, _ = build(script)
    with pytest.raises(EngineFailure, match="ended before"):
        await events_of(service, call())


async def collect(service: Service, request: Call) -> tuple[list[Event], BaseException | None]:
    events: list[Event] = []
    try:
        async for event in service.generate(request):
            events.append(event)
    except (RemudaError, Cancelled) as error:
        return events, error
    return events, None


@pytest.mark.parametrize(
    ("limits", "before", "name"),
    [
        (TimeLimits(queue_s=5), [], "queue"),
        (TimeLimits(first_token_s=5), [], "first token"),
        (TimeLimits(total_s=5), [], "total"),
        (TimeLimits(total_s=5), [300, 301], "total"),
    ],
)
@pytest.mark.parametrize("by_server", [False, True])
async def test_deadlines(limits: TimeLimits, before: list[int], name: str, by_server: bool, build: Build) -> None:
    service, backend, clock = build(Gate(before=before), limits=limits if by_server else TimeLimits())
    request = call() if by_server else call(limits=limits)
    running = asyncio.create_task(collect(service, request))
    await backend.until(lambda: bool(backend.live))
    clock.advance(4.9)
    await asyncio.sleep(0)
    assert not running.done()
    clock.advance(0.2)
    events, error = await asyncio.wait_for(running, 5)
    assert isinstance(error, DeadlineExceeded)
    assert f"{name} deadline" in str(error)
    assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == len(before)
    assert backend.live == set()


async def test_an_output_ends_the_queue_deadline_and_a_token_the_first_token_deadline(build: Build) -> None:
    steps: asyncio.Queue[Output] = asyncio.Queue()

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        while True:
            output = await steps.get()
            yield output
            steps.task_done()

    service, backend, clock = build(script, limits=TimeLimits(queue_s=5, first_token_s=10))
    running = asyncio.create_task(collect(service, call()))
    await backend.until(lambda: bool(backend.live))
    steps.put_nowait(Output("q.0", []))
    await steps.join()
    clock.advance(6)
    steps.put_nowait(Output("q.0", [300]))
    await steps.join()
    clock.advance(600)
    steps.put_nowait(Output("q.0", [301], FinishReason.LENGTH))
    events, error = await running
    assert error is None
    assert isinstance(events[-1], Usage)


async def test_a_client_cannot_stretch_the_servers_limits() -> None:
    bounds = TimeLimits(total_s=5, first_token_s=None)
    assert TimeLimits(total_s=50, first_token_s=3).within(bounds) == TimeLimits(5, None, 3)


async def test_a_long_prompt_does_not_stall_a_short_one(build: Build, tiny: Tokenizer) -> None:
    service, backend, _ = build(says([300]))
    backend.infos = [replica_info(max_model_len=10_000_000)]
    long_text = "The quick brown fox jumps over the lazy dog. " * 60_000
    long = asyncio.create_task(service.tokenize(TextPrompt(long_text)))
    await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.wait_for(service.tokenize(TextPrompt("short")), 5)
    assert not long.done(), "the long text was too short for this test"
    assert len(await long) > 100_000


async def test_tokenize_and_detokenize_are_inverse(build: Build) -> None:
    service, _, _ = build(says([300]))
    ids = await service.tokenize(TextPrompt("Hello, wörld 🙂"))
    assert await service.detokenize(ids) == "<|begin_of_text|>Hello, wörld 🙂"
    with pytest.raises(InvalidRequest):
        await service.detokenize([2048])
    with pytest.raises(ModelNotFound):
        await service.tokenize(TextPrompt("x"), "other")
