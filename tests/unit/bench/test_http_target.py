"""What other servers send: each line of a stream as it is, and every way in which it can go wrong."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.bench.http_target import HttpTarget
from cluster.bench.load import timed
from cluster.bench.target import LoadRequest
from cluster.bench.timing import Timing
from cluster.errors import ModelNotFound, ServingError, Unauthenticated
from engine.errors import InvalidOption

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}


class OtherServer:
    """Answers with what a test gives it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.models: Any = {"data": [{"id": "m"}]}
        self.body: dict[str, Any] = {}
        self.headers: dict[str, str] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.body, self.headers = await request.json(), dict(request.headers)
        if self.refusal is not None:
            return web.Response(status=self.refusal[0], text=self.refusal[1])
        return web.Response(text="".join(f"{line}\n\n" for line in self.lines), content_type="text/event-stream")

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)


@pytest.fixture
async def server() -> AsyncIterator[tuple[OtherServer, str]]:
    other, app = OtherServer(), web.Application()
    app.router.add_post("/v1/completions", other.answer)
    app.router.add_post("/v1/chat/completions", other.answer)
    app.router.add_get("/v1/models", other.list_models)
    async with TestServer(app) as running:
        yield other, str(running.make_url("/"))


async def answered(url: str, prompt: str | list[int] = "hello", **options: Any) -> Timing:
    target = await HttpTarget.open(url, **options)
    try:
        timing = Timing()
        await target.run(LoadRequest(prompt, 5), timing)
        return timing
    finally:
        await target.close()


def events(*values: dict[str, Any]) -> list[str]:
    return [*(f"data: {json.dumps(value)}" for value in values), "data: [DONE]"]


async def test_completions(server: tuple[OtherServer, str]) -> None:
    other, url = server
    choices = [{"text": "a", "finish_reason": None}, {"text": "", "finish_reason": None}, {"text": "b"}]
    last = {"text": "", "finish_reason": "length"}  # says that it ended; no token of its own
    other.lines = [": ping", *events(*({"choices": [each]} for each in [*choices, last]), {"usage": USAGE})]
    timing = await answered(url, [1, 2, 3], api_key="k")
    assert len(timing.chunks_s) == 3
    assert (timing.num_input, timing.num_output, timing.num_cached, timing.is_counted) == (7, 5, 4, True)
    wanted = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "stream": True}
    assert other.body == {**wanted, "stream_options": {"include_usage": True}, "ignore_eos": True}
    assert other.headers["Authorization"] == "Bearer k"


async def test_chat_counts_what_is_said_thought_or_called(server: tuple[OtherServer, str]) -> None:
    other, url = server
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "a"},
        {"tool_calls": [{}]},
        {},
    ]
    other.lines = events(*({"choices": [{"delta": each, "finish_reason": None}]} for each in deltas))
    timing = await answered(url, chat=True, ignore_eos=False)
    assert (len(timing.chunks_s), timing.num_output, timing.is_counted) == (3, 3, False)
    assert other.body["messages"] == [{"role": "user", "content": "hello"}]
    assert "ignore_eos" not in other.body


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (events({"error": {"message": "out of it"}}), "out of it"),
        (events({"error": "plain"}), "plain"),
        (events(), "without a token"),
        (["data: {"], "did not answer as OpenAI's API does"),
        (['data: {"choices": 3}'], "did not answer as OpenAI's API does"),
    ],
)
async def test_a_stream_that_breaks_is_a_failed_request(
    server: tuple[OtherServer, str], lines: list[str], words: str
) -> None:
    other, url = server
    other.lines = lines
    with pytest.raises(ServingError, match=words):
        await answered(url)
    target = await HttpTarget.open(url)
    timing = await timed(target, LoadRequest("x", 5))
    await target.close()
    assert timing.error and words in timing.error and timing.ended_s >= timing.sent_s > 0


@pytest.mark.parametrize(
    ("status", "text", "kind", "words"),
    [
        (401, '{"error": {"message": "who?"}}', Unauthenticated, "401: who\\?; give --api-key-file"),
        (404, '{"error": {"message": "no m"}}', ModelNotFound, "404: no m"),
        (429, '{"detail": "later"}', ServingError, "429: .*later"),
        (500, "<html>", ServingError, "500: <html>"),
        (503, '["x"]', ServingError, "503: "),
    ],
)
async def test_refusals_keep_the_servers_words(
    server: tuple[OtherServer, str], status: int, text: str, kind: type[Exception], words: str
) -> None:
    other, url = server
    other.refusal = (status, text)
    with pytest.raises(kind, match=words):
        await answered(url)


@pytest.mark.parametrize(
    ("models", "kind", "words"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, InvalidOption, "serves a, b; choose one with --model"),
        ({"data": []}, InvalidOption, "serves no model"),
        ({"models": []}, ServingError, "did not answer as OpenAI's API does"),
        ([], ServingError, "did not answer as OpenAI's API does"),
    ],
)
async def test_the_only_model_is_taken(
    server: tuple[OtherServer, str], models: Any, kind: type[Exception], words: str
) -> None:
    other, url = server
    other.models = models
    with pytest.raises(kind, match=words):
        await answered(url)
