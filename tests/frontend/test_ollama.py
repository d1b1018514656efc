"""Ollama's API with Ollama's own client, over a scripted model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import EngineFailure
from engine.request import GrammarKind, Output, Request
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import CONVERSATION, EOT
from tests.frontend.scripted import ScriptedBackend, says
from tests.frontend.servers import Served, served
from tests.frontend.test_templates import TOOLS
from tests.frontend.test_tools_http import TWO_CALLS, WEATHER, end_of, ids_of, saying

USER = [{"role": "user", "content": "Hi"}]
SAID = [300, 301, 302, 303]


@asynccontextmanager
async def client_of(backend: Any, **changes: Any) -> AsyncIterator[tuple[ollama.AsyncClient, Served]]:
    async with served(backend, **changes) as one:
        client = ollama.AsyncClient(host=one.url, timeout=20, trust_env=False)
        try:
            yield client, one
        finally:
            await client._client.aclose()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("ollama") / "m", CONVERSATION)


async def test_streams_say_what_whole_answers_say() -> None:
    async with client_of(ScriptedBackend(says(SAID, stop_token_id=EOT))) as (client, one):
        text = one.front_end.service.tokenizer.decode(SAID)
        whole = await client.generate("m", "Hello")
        assert (whole.response, whole.done, whole.done_reason) == (text, True, "stop")
        assert whole.eval_count == len(SAID) + 1 and whole.prompt_eval_count
        assert whole.total_duration is not None and whole.eval_duration is not None
        assert 0 < whole.eval_duration <= whole.total_duration
        lines = [line async for line in await client.generate("m", "Hello", stream=True)]
        assert "".join(line.response for line in lines) == text
        assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].eval_count == whole.eval_count

        chat = await client.chat("m", USER)
        assert chat.message.content == text and chat.message.role == "assistant"
        parts = [part async for part in await client.chat("m", USER, stream=True)]
        assert "".join(part.message.content or "" for part in parts) == text
        assert parts[-1].done_reason == "stop" and parts[-1].prompt_eval_count == chat.prompt_eval_count


async def test_options_reach_the_engine() -> None:
    options = {
        "num_predict": 3,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.25,
        "seed": 11,
        "repeat_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "num_ctx": 64,
        "num_gpu": 1,
    }
    async with client_of(ScriptedBackend(says(SAID))) as (client, one):
        answer = await client.generate("m", "Hello", options=options, keep_alive="5m", system="Be brief")
        assert answer.done_reason == "length" and answer.eval_count == 3
        sampling = one.backend.requests[0].sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (3, 0.5, 7, 0.75)
        assert (sampling.min_p, sampling.seed, sampling.repetition_penalty) == (0.25, 11, 1.5)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        tokenizer = one.front_end.service.tokenizer
        assert "Be brief" in tokenizer.decode(one.backend.requests[0].token_ids)
        await client.generate("m", "<|eot|>Hello", raw=True)
        assert one.backend.requests[1].token_ids == tokenizer.encode("<|eot|>Hello", parse_special_tokens=True)
        stopped = await client.generate("m", "Hello", options={"stop": [tokenizer.decode(SAID[1:2])]})
        assert stopped.response == tokenizer.decode(SAID[:1]) and stopped.done_reason == "stop"


async def test_format_becomes_a_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with client_of(ScriptedBackend(says(SAID))) as (client, one):
        await client.generate("m", "Hello", format="json")
        await client.chat("m", USER, format=schema)
        grammars = [request.sampling.grammar for request in one.backend.requests]
        assert [grammar.kind for grammar in grammars] == [GrammarKind.JSON_SCHEMA] * 2
        assert grammars[0].text == '{"type":"object"}' and '"integer"' in grammars[1].text
        refused = await one.http.post("/api/generate", json={"model": "m", "prompt": "Hello", "format": "xml"})
        assert refused.status_code == 400 and "format must be" in refused.json()["error"]


async def test_logprobs() -> None:
    async with client_of(ScriptedBackend(says(SAID))) as (client, _):
        answer = await client.generate("m", "Hello", logprobs=True, top_logprobs=2, options={"num_predict": 2})
        assert [entry.logprob for entry in answer.logprobs or ()] == [-0.3, -0.301]
        assert [len(entry.top_logprobs or ()) for entry in answer.logprobs or ()] == [2, 2]


async def test_tool_calls_come_whole(path: Path) -> None:
    tokenizer = Tokenizer(read_model_files(path))
    backend = saying(ids_of(tokenizer, TWO_CALLS), end_of(tokenizer))
    async with client_of(backend, model_path=path) as (client, one):
        answer = await client.chat("m", USER, tools=TOOLS)
        expected = [("get_weather", WEATHER["parameters"]), ("get_weather", {})]
        assert _calls(answer.message.tool_calls) == expected
        parts = [part async for part in await client.chat("m", USER, tools=TOOLS, stream=True)]
        assert [call for part in parts for call in _calls(part.message.tool_calls)] == expected
        assert (await client.show("m")).capabilities == ["completion", "tools"]
        result = {"role": "tool", "content": "sunny", "tool_name": "get_weather"}
        await client.chat("m", [*USER, answer.message, result], tools=TOOLS)
        prompt = tokenizer.decode(one.backend.requests[-1].token_ids)
        assert "sunny" in prompt and "Köln" in prompt


def _calls(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, call.function.arguments) for call in calls or ()]


async def test_models_are_described() -> None:
    async with client_of(ScriptedBackend(says(SAID))) as (client, one):
        (listed,) = (await client.list()).models
        assert listed.model == "m" and listed.size and listed.size > 10**6
        assert listed.details is not None and listed.details.format == "safetensors"
        (running,) = (await client.ps()).models
        assert running.context_length == 512 and running.digest == listed.digest
        shown = await client.show("m:latest")
        assert shown.modelinfo is not None and shown.modelinfo["llama4_text.block_count"] == 8
        assert shown.capabilities == ["completion"] and "header_start" in (shown.template or "")
        assert "version" in (await one.http.get("/api/version")).json()
        assert (await client.generate("m:latest", "Hi")).model == "m:latest"
        loaded = await client.generate("m")
        assert (loaded.response, loaded.done, loaded.done_reason) == ("", True, "load")
        assert (await client.chat("m")).done_reason == "load"


async def test_errors_have_ollamas_shape() -> None:
    async with client_of(ScriptedBackend(says(SAID)), api_key_file=None) as (client, one):
        for asked in (client.pull("m"), client.push("m"), client.delete("m"), client.copy("m", "n")):
            with pytest.raises(ollama.ResponseError, match="is not served") as caught:
                await asked
            assert caught.value.status_code == 400
        for asked in (client.generate("other", "x"), client.show("other"), client.chat("other:latest", USER)):
            with pytest.raises(ollama.ResponseError, match="does not exist here") as caught:
                await asked
            assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="images are not served"):
            await client.chat("m", [{"role": "user", "content": "x", "images": ["aGFsbG8="]}])
        for response in (await one.http.get("/api/chat"), await one.http.post("/api/nothing"), await _broken(one)):
            assert response.status_code in (400, 404, 405) and isinstance(response.json()["error"], str)


async def _broken(one: Served) -> httpx.Response:
    return await one.http.post("/api/chat", content=b'{"model": "m", "messages": [{]')


async def test_a_failure_in_the_stream_is_the_last_line() -> None:
    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(request.request_id, SAID[:2])
        raise EngineFailure("the engine broke")

    async with client_of(ScriptedBackend(script)) as (client, _):  # type: ignore[arg-type]
        parts = []
        with pytest.raises(ollama.ResponseError, match="the engine broke"):
            async for part in await client.generate("m", "Hello", stream=True):
                parts.append(part)
        assert parts
