"""A stored response outlives the front end that began it: another one takes it over from the leaders."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import openai
import pytest

from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from tests.frontend.servers import Served, served
from tests.support.leader_bed import WAIT_S, Bed, serving, until
from tests.tenants.test_counted_once import Halting, SmallVocabulary

NUM_TOKENS = 400


@asynccontextmanager
async def front_end_of(bed: Bed, name: str) -> AsyncIterator[Served]:
    fleet = Fleet()
    try:
        await fleet.add("r0", ReplicaClient(bed.address, name))
        async with served(fleet) as one:
            yield one
    finally:
        await fleet.close()


def text_of(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def read(response: Any, num_deltas: int | None = None) -> list[dict[str, Any]]:
    """All events, or those until so many deltas came."""
    return await read_lines(response.aiter_lines(), num_deltas)


async def read_lines(lines: AsyncIterator[str], num_deltas: int | None = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async for line in lines:
        if line.startswith("data: "):
            events.append(json.loads(line.removeprefix("data: ")))
            if num_deltas is not None and sum("delta" in event for event in events) == num_deltas:
                return events
    return events


async def test_a_response_goes_on_at_another_front_end() -> None:
    body: Any = {"model": "m", "input": "Hello", "max_output_tokens": NUM_TOKENS}
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(SmallVocabulary()))
        second = await stack.enter_async_context(front_end_of(bed, "second"))
        async with front_end_of(bed, "first") as first:
            earlier = await first.openai.responses.create(model="m", input="Before", max_output_tokens=4)
            body["previous_response_id"] = earlier.id
            async with first.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
                had = await read(response, num_deltas=1)
                bed.engine.gate.clear()
        # The client had half of what came.
        response_id, delta = had[0]["response"]["id"], had[-1]["delta"]
        num_had = (len(delta) + 1) // 2
        number = had[-1]["sequence_number"] - len(delta) + num_had
        bed.engine.gate.set()
        path = f"/v1/responses/{response_id}?stream=true&starting_after={number}"
        async with second.http.stream("GET", path) as response:
            rest = await read(response)
        assert rest[0]["sequence_number"] > number and rest[-1]["type"] == "response.incomplete"
        whole = rest[-1]["response"]["output"][0]["content"][0]["text"]
        assert delta[:num_had] + text_of(rest) == whole
        assert rest[-1]["response"]["usage"]["output_tokens"] == NUM_TOKENS
        assert bed.engine.num_steps <= NUM_TOKENS + 4 + 8, "nothing was computed twice"
        # It is this front end's now, its conversation included.
        kept = await second.openai.responses.retrieve(response_id)
        assert kept.output_text == whole and kept.previous_response_id == earlier.id
        more = await second.openai.responses.create(
            model="m", input="After", previous_response_id=response_id, max_output_tokens=4
        )
        assert more.usage and kept.usage and more.usage.input_tokens > kept.usage.input_tokens
        with pytest.raises(openai.NotFoundError):
            await second.openai.responses.retrieve("resp_unknown")
        await second.openai.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            await second.openai.responses.retrieve(response_id)


async def test_two_front_ends_that_are_asked_in_turn() -> None:
    """Each has it from the leaders when it is asked; neither says of it that it was cancelled."""
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(Halting()))
        both = [await stack.enter_async_context(front_end_of(bed, name)) for name in ("first", "second")]
        first, second = (each.openai.responses for each in both)
        begun = await first.create(model="m", input="Hello", background=True, max_output_tokens=NUM_TOKENS)
        path = f"/v1/responses/{begun.id}?stream=true"
        async with both[0].http.stream("GET", path) as response:
            lines = response.aiter_lines()
            had = await read_lines(lines, num_deltas=1)
            await until(lambda: not bed.engine.gate.is_set())
            assert (await second.retrieve(begun.id)).status == "in_progress"
            had += await read_lines(lines)
        last = had.pop()
        assert (last["type"], last["code"]) == ("error", "taken_over")
        assert "response.cancelled" not in {event["type"] for event in had}
        for each in (first, second, first):
            assert (await each.retrieve(begun.id)).status == "in_progress"
        bed.engine.gate.set()
        rest = await _rest(both[1], path, last["sequence_number"])
        kept = [await _finished(each, begun.id) for each in (second, first)]
        assert [each.status for each in kept] == ["incomplete"] * 2
        assert kept[0].output_text == kept[1].output_text == text_of(had) + text_of(rest)


async def test_who_comes_back_where_it_cannot_be_read_yet_is_told_so() -> None:
    """It still runs: that is not its end. Numbers of events go on behind those that the client has."""
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(Halting()))
        first, second = [await stack.enter_async_context(front_end_of(bed, name)) for name in ("first", "second")]
        body = {"model": "m", "input": "Hello", "background": True, "max_output_tokens": NUM_TOKENS}
        begun = (await first.http.post("/v1/responses", json=body)).json()
        await until(lambda: not bed.engine.gate.is_set())
        await bed.server.drain()
        await until(lambda: not second.front_end.service.backend.replicas()[0].state.takes_requests)
        async with second.http.stream("GET", f"/v1/responses/{begun['id']}?stream=true&starting_after=6") as response:
            (told,) = await read(response)
        assert (told["type"], told["sequence_number"], told["code"]) == ("error", 6, "unavailable")
        assert bed.server.num_live_requests == 1
        bed.engine.gate.set()
        assert (await _finished(first.openai.responses, begun["id"])).status == "incomplete"


async def _rest(one: Served, path: str, number: int) -> list[dict[str, Any]]:
    """As a client goes on, also where it is turned away again."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(WAIT_S):
        while True:
            async with one.http.stream("GET", f"{path}&starting_after={number}") as response:
                events += await read(response)
            if events[-1]["type"] != "error":
                return events
            number = events.pop()["sequence_number"]


async def _finished(api: Any, response_id: str) -> Any:
    async with asyncio.timeout(WAIT_S):
        while (found := await api.retrieve(response_id)).status == "in_progress":  # noqa: ASYNC110  as its clients do
            await asyncio.sleep(0.02)
    return found


@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_another_front_end_stops_it_at_once(how: str) -> None:
    """It has not read anything of it yet."""
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(SmallVocabulary()))
        second = await stack.enter_async_context(front_end_of(bed, "second"))
        async with front_end_of(bed, "first") as first:
            bed.engine.gate.clear()
            body = {"model": "m", "input": "Hello", "background": True, "max_output_tokens": NUM_TOKENS}
            begun = (await first.http.post("/v1/responses", json=body)).json()
            await until(lambda: bed.server.num_live_requests == 1)
        api: Any = second.openai.responses
        async with asyncio.timeout(15):
            answer = await getattr(api, how)(begun["id"])
        assert how == "delete" or answer.status == "cancelled"
        bed.engine.gate.set()
        await until(lambda: bool(bed.engine.aborted))
        await until(lambda: bed.server.num_live_requests == 0)
        if how == "cancel":
            assert (await api.retrieve(begun["id"])).status == "cancelled"
        else:
            with pytest.raises(openai.NotFoundError):
                await api.retrieve(begun["id"])


async def test_a_cancelled_response_stops_at_the_leader() -> None:
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(SmallVocabulary()))
        one = await stack.enter_async_context(front_end_of(bed, "only"))
        create: Any = one.openai.responses.create
        with pytest.raises(openai.BadRequestError, match="context length"):
            await create(model="m", input="Hello", background=True, max_output_tokens=10**6)
        bed.engine.gate.clear()
        begun = await create(model="m", input="Hello", background=True, max_output_tokens=NUM_TOKENS)
        await until(lambda: bed.server.num_live_requests == 1)
        cancelled = await one.openai.responses.cancel(begun.id)
        assert cancelled.status == "cancelled"
        bed.engine.gate.set()
        await until(lambda: bool(bed.engine.aborted))
        await until(lambda: bed.server.num_live_requests == 0)
