"""Structured output over the API: OpenAI's own client and gRPC against a front end and a model that computes."""

import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import openai
import pytest

from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.config import GrammarBackend
from tests.frontend.bodies import chat, completion
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import Served, served
from tests.structured.engine_bed import TINY

TEMPLATE = "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
PLACE = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
    "required": ["side", "far"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": PLACE, "strict": True}},
    {"type": "function", "function": {"name": "wait"}},
]
USER: Any = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """remuda-tiny with a template that takes tools."""
    path = tmp_path_factory.mktemp("structured") / "m"
    path.mkdir()
    for file in TINY.iterdir():
        os.symlink(file, path / file.name)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def backend(checkpoint: Path) -> Iterator[RealBackend]:
    made = RealBackend(checkpoint)
    yield made
    made.close()


@pytest.fixture
async def one(backend: RealBackend, checkpoint: Path) -> AsyncIterator[Served]:
    async with served(backend, model_path=checkpoint) as running:
        yield running


async def test_response_format_with_the_openai_client(one: Served) -> None:
    create: Any = one.openai.chat.completions.create
    answer = await create(model="m", messages=USER, response_format=FORMAT, n=3, seed=4, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in answer.choices]
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        assert choice.finish_reason == "stop" and choice.logprobs.content
    assert len(set(texts)) > 1
    stream = await create(model="m", messages=USER, response_format=FORMAT, n=3, seed=4, stream=True)
    streamed = ["", "", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_completions_take_every_field(one: Served) -> None:
    for fields, pattern in (
        ({"guided_regex": "(ab){1,4}"}, "(ab){1,4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= [a-f]+ "."', "json": None}, "max_tokens": 60}, r"[a-f]+(\.|$)"),
        ({"response_format": FORMAT, "stop": [","], "max_tokens": 60}, r'\{\s*"name"\s*:\s*".*"\s*|\{.*'),
    ):
        response = await one.http.post("/v1/completions", json=completion(max_tokens=40) | fields)
        assert response.status_code == 200, response.text
        assert re.fullmatch(pattern, response.json()["choices"][0]["text"], re.DOTALL), (fields, response.text)


@pytest.mark.parametrize("named", [None, "find", "wait"])
async def test_a_call_can_be_forced(one: Served, named: str | None) -> None:
    create: Any = one.openai.chat.completions.create
    choice = {"type": "function", "function": {"name": named}} if named else "required"
    answer = await create(model="m", messages=USER, tools=TOOLS, tool_choice=choice, temperature=0.5, seed=3)
    (made,) = answer.choices
    assert made.finish_reason == "tool_calls" and made.message.content is None, made
    (call,) = made.message.tool_calls
    assert call.function.name == named if named else call.function.name in {"find", "wait"}
    arguments = json.loads(call.function.arguments)
    if call.function.name == "find":
        jsonschema.validate(arguments, PLACE)


@pytest.mark.parametrize("following", list(GrammarBackend))
async def test_what_cannot_be_compiled_is_refused_by_name(
    backend: RealBackend, checkpoint: Path, following: GrammarBackend
) -> None:
    async with served(backend, model_path=checkpoint, guided_decoding_backend=following) as one:
        await _refuses_by_name(one)


async def _refuses_by_name(one: Served) -> None:
    broken = {"type": "object", "properties": {"a": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await one.openai.chat.completions.create(
            model="m",
            messages=USER,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": broken}},
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert "at /properties/a: Invalid type: objekt" in caught.value.message
    tool = {"type": "function", "function": {"name": "f", "parameters": broken}}
    for body, param, words in (
        (chat(tools=[tool], tool_choice="required"), "tools", "/$defs/f/properties/a"),
        (chat(guided_regex="(a"), "guided_regex", "unclosed group"),
        (chat(guided_regex="a", ignore_eos=True), "ignore_eos", "end token"),
        (chat(guided_choice=[]), "guided_choice", "1 to 1024 strings"),
        (chat(guided_regex=""), "guided_regex", "not empty"),
    ):
        response = await one.http.post("/v1/chat/completions", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param) and words in error["message"]


async def test_what_only_xgrammar_cannot_compile_is_refused_where_it_follows(
    backend: RealBackend, checkpoint: Path, one: Served
) -> None:
    letters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^\\p{L}{1,3}$"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": letters}}
    bodies = {
        "response_format.json_schema.schema": chat(max_tokens=30, response_format=schema),
        "guided_regex": chat(max_tokens=30, guided_regex="(?i)yes|no"),
    }
    for body in bodies.values():
        assert (await one.http.post("/v1/chat/completions", json=body)).status_code == 200
    async with served(backend, model_path=checkpoint, guided_decoding_backend=GrammarBackend.XGRAMMAR) as other:
        for param, body in bodies.items():
            response = await other.http.post("/v1/chat/completions", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), response.text
            assert "xgrammar cannot compile it: Regex parsing error" in error["message"]
        assert (
            "cannot be compiled at /properties/a: "
            in (
                await other.http.post("/v1/chat/completions", json=bodies["response_format.json_schema.schema"])
            ).json()["error"]["message"]
        )
        stub: Any = inference_pb2_grpc.InferenceStub(other.channel)
        sampling = common_pb2.SamplingParams(max_tokens=20, grammar=common_pb2.Grammar(regex="(?i)yes"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Generate(inference_pb2.GenerateRequest(text="Hello", sampling=sampling))))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_grpc_takes_grammars(one: Served) -> None:
    stub: Any = inference_pb2_grpc.InferenceStub(one.channel)
    sampling = common_pb2.SamplingParams(max_tokens=20, grammar=common_pb2.Grammar(regex="[0-9]{3}"))
    text = ""
    async for message in stub.Generate(inference_pb2.GenerateRequest(text="Hello", sampling=sampling)):
        text += message.delta.text
    assert re.fullmatch("[0-9]{3}", text)
