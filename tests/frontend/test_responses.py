"""The Responses API with OpenAI's own client, over a scripted model."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import TypeAdapter

from cluster.errors import ModelNotFound
from cluster.frontend.model_files import read_model_files
from cluster.frontend.responses.responses import Responses
from cluster.frontend.responses.store import ResponseStore
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import EngineFailure
from engine.request import GrammarKind, Output, Request
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import CONVERSATION, EOT
from tests.frontend.scripted import Gate, ScriptedBackend, says
from tests.frontend.servers import Served, served
from tests.frontend.test_tools_http import TWO_CALLS, WEATHER, end_of, ids_of, saying

SAID = [300, 301, 302, 303, 304, 305]
TOOLS: Any = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}]


def responses_of(one: Served) -> Any:
    return one.openai.responses


async def events_of(one: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    """As they come over the wire."""
    request = one.http.build_request("POST" if body else "GET", path, json=body or None)
    response = await one.http.send(request)
    assert response.status_code == 200, response.text
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    pairs = [block.split("\n") for block in blocks]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in events]
    return events


def said_in(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def test_streams_say_what_whole_answers_say() -> None:
    async with served(ScriptedBackend(says(SAID, stop_token_id=EOT))) as one:
        create = responses_of(one).create
        text = one.front_end.service.tokenizer.decode(SAID)
        asked: Any = {"model": "m", "input": "Hi", "instructions": "Be brief", "metadata": {"a": "b"}}
        whole = await create(**asked)
        assert (whole.output_text, whole.status, whole.error) == (text, "completed", None)
        assert (whole.usage.output_tokens, whole.metadata) == (len(SAID) + 1, {"a": "b"})
        assert "Be brief" in one.front_end.service.tokenizer.decode(one.backend.requests[0].token_ids)
        Response.model_validate(whole.model_dump(by_alias=True, warnings=False))

        events = [event async for event in await create(**asked, stream=True)]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
        kinds = list(dict.fromkeys(event.type for event in events))
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        final = events[-1].response
        assert final.output_text == text and final.usage == whole.usage
        async with responses_of(one).stream(**asked) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_text == text


async def test_every_event_is_one_that_the_client_knows() -> None:
    known: Any = TypeAdapter(openai.types.responses.ResponseStreamEvent)
    async with served(ScriptedBackend(says(SAID))) as one:
        events = await events_of(one, "/v1/responses", model="m", input="Hi", stream=True, top_logprobs=2)
        for event in events:
            known.validate_python(event)
        numbers = [event["sequence_number"] for event in events]
        assert numbers == sorted(set(numbers))
        logprobs = [entry for event in events if "delta" in event for entry in event["logprobs"]]
        assert [entry["logprob"] for entry in logprobs] == [-token / 1000 for token in SAID]


async def test_a_stream_goes_on_behind_any_event() -> None:
    gate = Gate(before=SAID[:3], after=SAID[3:])
    async with served(ScriptedBackend(gate)) as one:
        tokenizer = one.front_end.service.tokenizer
        had: list[Any] = []
        stream = await responses_of(one).create(model="m", input="Hi", stream=True)
        async for event in stream:
            had.append(event)
            if "".join(each.delta for each in had if hasattr(each, "delta")) == tokenizer.decode(SAID[:3]):
                break
        await stream.close()
        response_id = had[0].response.id
        running = await responses_of(one).retrieve(response_id)
        assert (running.status, running.output_text) == ("in_progress", tokenizer.decode(SAID[:3]))

        rest = await responses_of(one).retrieve(response_id, stream=True, starting_after=had[-1].sequence_number)
        asyncio.get_running_loop().call_later(0.05, gate.opened.set)
        later = [event async for event in rest]
        assert later[0].sequence_number > had[-1].sequence_number
        text = "".join(event.delta for event in [*had, *later] if event.type == "response.output_text.delta")
        assert text == tokenizer.decode(SAID) == later[-1].response.output_text
        assert not one.backend.aborted

        # It is over: however the deltas are cut now, behind each number stands the same.
        whole = await events_of(one, f"/v1/responses/{response_id}?stream=true")
        assert len(whole) < len(had) + len(later)
        for number in range(-1, whole[-1]["sequence_number"] + 1):
            query = f"stream=true&starting_after={number}" if number >= 0 else "stream=true"
            part = await events_of(one, f"/v1/responses/{response_id}?{query}")
            known = said_in([event for event in whole if event["sequence_number"] <= number])
            cut = [event for event in part if event["type"] == "response.output_text.delta"]
            assert text.endswith(said_in(part)) and len(known) <= len(text) - len(said_in(part))
            assert all(event["sequence_number"] > number for event in part)
            if cut:
                first = next(event for event in whole if event["type"] == "response.output_text.delta")
                assert len(cut[0]["delta"]) == min(len(text), first["sequence_number"] - number)


async def test_conversations(path: Path) -> None:
    tokenizer = Tokenizer(read_model_files(path))
    backend = saying(ids_of(tokenizer, TWO_CALLS), end_of(tokenizer))
    async with served(backend, model_path=path) as one:
        create = responses_of(one).create
        first = await create(model="m", input="Weather?", tools=TOOLS, instructions="Be brief")
        assert [(item.type, item.name, json.loads(item.arguments)) for item in first.output] == [
            ("function_call", "get_weather", WEATHER["parameters"]),
            ("function_call", "get_weather", {}),
        ]
        events = [event async for event in await create(model="m", input="Weather?", tools=TOOLS, stream=True)]
        deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert deltas == "".join(item.arguments for item in first.output)

        outputs = [{"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}]
        second = await create(model="m", input=outputs, previous_response_id=first.id, tools=TOOLS)
        prompt = tokenizer.decode(one.backend.requests[-1].token_ids)
        places = [prompt.index(text) for text in ("Weather?", "Köln", "sunny")]
        assert places == sorted(places) and "Be brief" not in prompt
        third = await create(model="m", input="Thanks", previous_response_id=second.id)
        assert tokenizer.decode(one.backend.requests[-1].token_ids).count("sunny") == 1
        # The same conversation, told by the client.
        told = [{"role": "user", "content": "Weather?"}, *[item.model_dump() for item in first.output], *outputs]
        await create(model="m", input=told, tools=TOOLS, store=False)
        assert one.backend.requests[-1].token_ids == one.backend.requests[2].token_ids

        items = (await responses_of(one).input_items.list(third.id)).data
        assert items[0].content[0].text == "Thanks"
        await responses_of(one).delete(second.id)
        for gone in (
            responses_of(one).retrieve(second.id),
            create(model="m", input="x", previous_response_id=second.id),
        ):
            with pytest.raises(openai.NotFoundError, match="no longer stored"):
                await gone


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("responses") / "m", CONVERSATION)


async def test_forms_of_text_and_choices_become_grammars(path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with served(saying([300]), model_path=path) as one:
        create = responses_of(one).create
        wish: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
        answer = await create(model="m", input="Hi", text=wish, max_output_tokens=7, temperature=0.5, top_p=0.75)
        sampling = one.backend.requests[-1].sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.75)
        assert sampling.grammar.kind is GrammarKind.JSON_SCHEMA and '"integer"' in sampling.grammar.text
        assert answer.text.format.schema_ == schema
        for choice in ("required", {"type": "function", "name": "get_weather"}):
            await create(model="m", input="Hi", tools=TOOLS, tool_choice=choice)
            assert '"const":"get_weather"' in one.backend.requests[-1].sampling.grammar.text


async def test_in_the_background_and_cancelled() -> None:
    gate = Gate(before=SAID[:2], after=SAID[2:])
    async with served(ScriptedBackend(gate)) as one:
        api = responses_of(one)
        begun = await api.create(model="m", input="Hi", background=True)
        assert begun.status == "in_progress"
        text, kinds, cancelled = "", [], None
        async for event in await api.retrieve(begun.id, stream=True):
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
                cancelled = cancelled or await api.cancel(begun.id)
        assert cancelled is not None and cancelled.status == "cancelled"
        assert text and text == cancelled.output_text
        assert kinds[-1] == "response.cancelled"
        assert one.backend.aborted == [f"{begun.id}.0"]
        assert (await api.retrieve(begun.id)).status == "cancelled"
        assert (await api.cancel(begun.id)).status == "cancelled"


async def test_refused_ones_leave_nothing(build: Any) -> None:
    """They are many where a client does nothing but try."""
    service, _, clock = build(says(SAID))
    store = ResponseStore()
    responses = Responses(service, clock, store)
    for index in range(5):
        prepared = await responses.prepare(b'{"model": "other", "input": "x"}', f"resp_{index}", 0)
        live = responses.begin(*prepared)
        with pytest.raises(ModelNotFound):
            await anext(live.follow())
        await live.over.wait()
        assert len(store) == 0 and not store.knows(f"resp_{index}")


async def test_failures() -> None:
    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(request.request_id, SAID[:2])
        raise EngineFailure("the engine broke")

    async with served(ScriptedBackend(script)) as one:  # type: ignore[arg-type]
        events = await events_of(one, "/v1/responses", model="m", input="Hi", stream=True)
        failed = events[-1]
        assert failed["type"] == "response.failed" and "the engine broke" in failed["response"]["error"]["message"]
        kept = await responses_of(one).retrieve(failed["response"]["id"])
        assert (kept.status, kept.error.code) == ("failed", "server_error")
        with pytest.raises(openai.InternalServerError, match="the engine broke"):
            await responses_of(one).create(model="m", input="Hi")
        for changes, words in (
            ({"input": []}, "must not be empty"),
            ({"input": "x", "truncation": "auto"}, "never cut"),
            ({"input": "x", "background": True, "store": False}, "must be stored"),
            ({"input": "x", "tools": [{"type": "web_search"}]}, "only functions are"),
            ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
            ({"input": "x", "previous_response_id": failed["response"]["id"]}, "is not complete"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                await responses_of(one).create(model="m", **changes)
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            await responses_of(one).create(model="other", input="x")
        response = await one.http.get("/v1/responses/resp_1?stream=true&starting_after=x")
        assert response.status_code == 404
