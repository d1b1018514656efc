"""Anthropic's API with Anthropic's own client, over a scripted model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from cluster.frontend.answers import HttpSettings
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import EngineFailure, Overloaded
from engine.request import GrammarKind, Output, Request
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import CONVERSATION, EOT, USER
from tests.frontend.scripted import Gate, ScriptedBackend, says
from tests.frontend.servers import Served, served
from tests.frontend.test_tools_http import TWO_CALLS, WEATHER, end_of, ids_of, saying

SAID = [300, 301, 302, 303]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": "get_weather", "description": "Weather", "input_schema": SCHEMA}]


@asynccontextmanager
async def client_of(backend: Any, **changes: Any) -> AsyncIterator[tuple[Any, Served]]:
    async with served(backend, **changes) as one:
        http = httpx2.AsyncClient(timeout=20, trust_env=False)
        async with anthropic.AsyncAnthropic(base_url=one.url, api_key="k", max_retries=0, http_client=http) as client:
            yield client, one


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("anthropic") / "m", CONVERSATION)


async def test_streams_say_what_whole_answers_say() -> None:
    asked: Any = {
        "model": "m",
        "max_tokens": 10,
        "messages": USER,
        "system": "Be brief",
        # This version's client has no names for these.
        "extra_body": {"temperature": 0.5, "top_k": 7},
    }
    async with client_of(ScriptedBackend(says(SAID, stop_token_id=EOT, num_cached_tokens=3))) as (client, one):
        tokenizer = one.front_end.service.tokenizer
        whole = await client.messages.create(**asked)
        assert [(block.type, block.text) for block in whole.content] == [("text", tokenizer.decode(SAID))]
        assert (whole.stop_reason, whole.stop_sequence, whole.model, whole.role) == ("end_turn", None, "m", "assistant")
        assert whole.usage.output_tokens == len(SAID) + 1 and whole.usage.cache_read_input_tokens == 3
        (request,) = one.backend.requests
        assert whole.usage.input_tokens + 3 == len(request.token_ids)
        assert (request.sampling.temperature, request.sampling.top_k, request.sampling.max_tokens) == (0.5, 7, 10)
        assert "Be brief" in tokenizer.decode(request.token_ids)
        count = await client.messages.count_tokens(model="m", messages=USER, system="Be brief")
        assert count.input_tokens == len(request.token_ids)

        async with client.messages.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert [block.text for block in final.content] == [tokenizer.decode(SAID)] and final.usage == whole.usage
        assert [kind for kind in kinds if kind not in ("text", "content_block_delta")] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]


async def test_stops() -> None:
    async with client_of(ScriptedBackend(says(SAID))) as (client, one):
        tokenizer = one.front_end.service.tokenizer
        stop = tokenizer.decode(SAID[2:3])
        cut = await client.messages.create(model="m", max_tokens=9, messages=USER, stop_sequences=[stop])
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
        assert cut.content[0].text == tokenizer.decode(SAID[:2])
        short = await client.messages.create(model="m", max_tokens=2, messages=USER)
        assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)


async def test_tools_both_ways(path: Path) -> None:
    tokenizer = Tokenizer(read_model_files(path))
    backend = saying(ids_of(tokenizer, TWO_CALLS), end_of(tokenizer))
    async with client_of(backend, model_path=path) as (client, one):
        asked: Any = {"model": "m", "max_tokens": 400, "messages": USER, "tools": TOOLS}
        whole = await client.messages.create(**asked)
        assert whole.stop_reason == "tool_use"
        assert [(block.name, block.input) for block in whole.content] == [
            ("get_weather", WEATHER["parameters"]),
            ("get_weather", {}),
        ]
        async with client.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
        assert [(block.name, block.input) for block in final.content] == [(b.name, b.input) for b in whole.content]

        results = [
            {"type": "tool_result", "tool_use_id": whole.content[0].id, "content": [{"type": "text", "text": "sunny"}]},
            {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "unknown", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        turns = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        await client.messages.create(**{**asked, "messages": turns})
        prompt = tokenizer.decode(one.backend.requests[-1].token_ids)
        places = [prompt.index(text) for text in ("Köln", "sunny", "unknown", "And now?")]
        assert places == sorted(places)


async def test_choices_become_grammars(path: Path) -> None:
    backend = saying([300])
    async with client_of(backend, model_path=path) as (client, one):
        asked: Any = {"model": "m", "max_tokens": 5, "messages": USER}
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            await client.messages.create(**asked, tools=TOOLS, tool_choice=choice)
            grammar = one.backend.requests[-1].sampling.grammar
            assert grammar.kind is GrammarKind.JSON_SCHEMA and '"const":"get_weather"' in grammar.text
        await client.messages.create(**asked, tools=TOOLS, tool_choice={"type": "none"})
        assert one.backend.requests[-1].sampling.grammar is None
        config = {"format": {"type": "json_schema", "schema": SCHEMA}}
        await client.messages.create(**asked, output_config=config)
        assert '"city"' in one.backend.requests[-1].sampling.grammar.text


REFUSED = [
    ({"model": "other"}, anthropic.NotFoundError, "not_found_error", "does not exist here"),
    ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
    ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "must not be empty"),
    (
        {"messages": [*USER, {"role": "assistant", "content": "I"}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "does not continue",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "'image' are not served",
    ),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "web_search_20250305",
    ),
    ({"extra_body": {"temperature": "hot"}}, anthropic.BadRequestError, "invalid_request_error", "temperature"),
]


@pytest.mark.parametrize(("changes", "kind", "name", "words"), REFUSED, ids=lambda value: str(value)[:30])
async def test_errors_have_anthropics_shape(changes: Any, kind: Any, name: str, words: str) -> None:
    async with client_of(ScriptedBackend(says(SAID))) as (client, _):
        asked: Any = {"model": "m", "max_tokens": 5, "messages": USER, **changes}
        with pytest.raises(kind, match=words) as caught:
            await client.messages.create(**asked)
        assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == name


async def test_paths_and_overload_have_it_too() -> None:
    async def full(request: Request) -> AsyncIterator[Output]:
        raise Overloaded("all replicas are full", 7)
        yield

    async with client_of(ScriptedBackend(full)) as (client, one):  # type: ignore[arg-type]
        with pytest.raises(anthropic.RateLimitError) as caught:
            await client.messages.create(model="m", max_tokens=5, messages=USER)
        assert caught.value.response.headers["retry-after"] == "7"
        for response in (await one.http.get("/v1/messages"), await one.http.post("/v1/messages/batches", json={})):
            assert response.json()["type"] == "error", response.text


async def test_a_failure_in_the_stream_and_pings_while_it_is_idle() -> None:
    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(request.request_id, SAID[:2])
        raise EngineFailure("the engine broke")

    async with client_of(ScriptedBackend(script)) as (client, _):  # type: ignore[arg-type]
        with pytest.raises(anthropic.APIStatusError, match="the engine broke"):
            async with client.messages.stream(model="m", max_tokens=5, messages=USER) as stream:
                async for _ in stream:
                    pass

    gate = Gate(before=SAID[:1], after=SAID[1:])
    async with client_of(ScriptedBackend(gate), http=HttpSettings(ping_interval_s=0.05)) as (client, one):
        body = {"model": "m", "max_tokens": 9, "messages": USER, "stream": True}
        async with one.http.stream("POST", "/v1/messages", json=body) as response:
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                if line == "event: ping":
                    gate.opened.set()
        assert 'data: {"type":"ping"}' in lines and lines[-2].startswith('data: {"type":"message_stop"')
