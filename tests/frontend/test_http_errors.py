"""Everything that HTTP refuses, with its status and in OpenAI's form."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import ERROR_TABLE, Cancelled, Unavailable
from cluster.frontend.answers import HttpSettings
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import Overloaded, RankFailure, RemudaError, RequestFailure
from engine.request import Output, Request
from tests.frontend.bodies import USER, chat, completion, events_of
from tests.frontend.scripted import Gate, says
from tests.frontend.servers import served

REFUSED: list[tuple[str, Any, str | None]] = [
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", completion(prompt=""), "prompt"),
    ("/v1/completions", completion(prompt=[]), "prompt"),
    ("/v1/completions", completion(prompt=[""]), "prompt"),
    ("/v1/completions", completion(prompt=[[]]), "prompt"),
    ("/v1/completions", completion(prompt=[1.5]), "prompt"),
    ("/v1/completions", completion(prompt=[True]), "prompt"),
    ("/v1/completions", completion(prompt=["a", 1]), "prompt"),
    ("/v1/completions", completion(prompt={"a": 1}), "prompt"),
    ("/v1/completions", completion(prompt=[5, 99999]), "prompt"),
    ("/v1/completions", completion(max_tokens="5"), "max_tokens"),
    ("/v1/completions", completion(max_tokens=0), "max_tokens"),
    ("/v1/completions", completion(max_tokens=1.5), "max_tokens"),
    ("/v1/completions", completion(max_tokens=True), "max_tokens"),
    ("/v1/completions", completion(temperature="hot"), "temperature"),
    ("/v1/completions", completion(temperature=-1), "temperature"),
    ("/v1/completions", completion(top_p=0), "top_p"),
    ("/v1/completions", completion(logprobs=99), "logprobs"),
    ("/v1/completions", completion(n=0), "n"),
    ("/v1/completions", completion(best_of=3), "best_of"),
    ("/v1/completions", completion(suffix="x"), "suffix"),
    ("/v1/completions", completion(stop=[1]), "stop"),
    ("/v1/completions", completion(stop=["a"] * 17), "stop"),
    ("/v1/completions", completion(logit_bias={"x": 1}), "logit_bias"),
    ("/v1/completions", completion(logit_bias={"5": 101}), "logit_bias"),
    ("/v1/completions", completion(logit_bias={" 5 ": 1}), "logit_bias"),
    ("/v1/completions", completion(logit_bias={"1_0": 1}), "logit_bias"),
    ("/v1/completions", completion(logit_bias={"١": 1}), "logit_bias"),
    ("/v1/completions", completion(prompt=["a"] * 1025), "prompt"),
    ("/v1/completions", completion(stream_options={"include_usage": True}), "stream_options"),
    ("/v1/chat/completions", {"model": "m"}, "messages"),
    ("/v1/chat/completions", chat(messages=[]), "messages"),
    ("/v1/chat/completions", chat(messages="hi"), "messages"),
    ("/v1/chat/completions", chat(messages=[{"content": "x"}]), "messages.0.role"),
    ("/v1/chat/completions", chat(messages=[{"role": "user", "content": 5}]), "messages.0.content"),
    ("/v1/chat/completions", chat(messages=[*USER] * 4097), "messages"),
    ("/v1/chat/completions", chat(messages=[{"role": "user", "content": [{"type": ["x"]}]}]), "messages.0.content.0"),
    ("/v1/chat/completions", chat(messages=[{"role": "user", "content": [{"type": {}}]}]), "messages.0.content.0"),
    ("/v1/chat/completions", chat(messages=[{"role": "x" * 99_999, "content": "a"}]), "prompt"),
    ("/v1/chat/completions", chat(top_logprobs=2), "top_logprobs"),
    ("/v1/completions", completion(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    ("/v1/chat/completions", chat(tools=[{"type": "function"}]), "tools.0"),
    ("/v1/chat/completions", chat(response_format={"type": "xml"}), "response_format.type"),
    ("/v1/chat/completions", chat(guided_regex="(a"), "guided_regex"),
    ("/v1/chat/completions", chat(max_completion_tokens=-1), "max_tokens"),
    ("/v1/chat/completions", chat(timeout_s=-1), "timeout_s"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "a " * 60_000}, "prompt"),
    ("/detokenize", {"tokens": [99999]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
]


async def test_bad_bodies_name_the_field() -> None:
    async with served(says([300])) as one:
        for path, body, param in REFUSED:
            for stream in [{}, {"stream": True}] if path.startswith("/v1") and "stream_options" not in body else [{}]:
                response = await one.http.post(path, json={**body, **stream})
                assert response.status_code == 400, (path, body, response.text)
                error = response.json()["error"]
                assert error["param"] == param, (path, body, error)
                assert error["type"] == "invalid_request_error"
                assert error["message"]
                assert isinstance(error["code"], str)
        assert one.backend.requests == []


async def test_images_are_refused_clearly() -> None:
    parts = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    async with served(says([300])) as one:
        with pytest.raises(openai.BadRequestError, match="images are not served yet"):
            await one.openai.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": parts}],  # type: ignore[typeddict-item]
            )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": "a" "b"}', b"\xff\xfe", b'"x"'])
async def test_broken_json_is_refused(body: bytes) -> None:
    async with served(says([300])) as one:
        response = await one.http.post("/v1/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_lone_surrogates_are_the_clients_error() -> None:
    async with served(says([300])) as one:
        for body in (b'{"prompt": "\\ud800"}', b'{"prompt": "a", "stop": "\\udc00"}'):
            response = await one.http.post("/v1/completions", content=body)
            assert response.status_code == 400, response.text


async def test_unknown_fields_and_nulls_are_fine() -> None:
    async with served(says([300])) as one:
        body = completion(
            user="u", metadata={"a": 1}, brand_new=[1], temperature=None, stop=None, tools=None, suffix=""
        )
        assert (await one.http.post("/v1/completions", json=body)).status_code == 200


async def test_paths_and_methods_that_are_not_there() -> None:
    async with served(says([300])) as one:
        missing = await one.http.get("/v1/nothing")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"
        wrong = await one.http.get("/v1/completions")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        # Not sent elsewhere: behind a gateway it would be to plain HTTP, with the key.
        slashed = await one.http.post("/v1/completions/", json=completion())
        assert slashed.status_code == 404 and "location" not in slashed.headers
        unknown = await one.http.post("/v1/chat/completions", json=chat(model="gpt-9"))
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"


async def test_what_a_client_wrote_is_not_repeated_at_length() -> None:
    async with served(says([300])) as one:
        for body in (chat(model="😀" * 100_000), completion(logit_bias={"9" * 4000: 1.0, "7" * 100_000: "x"})):
            response = await one.http.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", json=body)
            assert response.status_code in (400, 404)
            assert len(response.content) < 4000


async def test_too_long_is_openais_error() -> None:
    async with served(says([300])) as one:
        with pytest.raises(openai.BadRequestError) as caught:
            await one.openai.completions.create(model="m", prompt=[5] * 510, max_tokens=10)
        assert caught.value.code == "context_length_exceeded"
        assert "512" in str(caught.value)
        assert "520" in str(caught.value)


async def test_bodies_are_bounded() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(40):
            yield b" " * 1000

    async with served(says([300]), http=HttpSettings(max_body_bytes=20_000)) as one:
        declared = await one.http.post("/v1/completions", json=completion(prompt="x" * 30_000))
        chunked = await one.http.post("/v1/completions", content=chunks())
        for response in (declared, chunked):
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "payload_too_large"


async def test_every_error_has_its_status_and_form() -> None:
    """Raised by the backend before anything was sent; plain and streamed alike."""
    raised: list[type[RemudaError]] = []

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        raise raised[-1]("because")
        yield

    async with served(script) as one:
        for kind, mapping in ERROR_TABLE.items():
            # A client that has gone is told nothing.
            if kind is Cancelled:
                continue
            raised.append(kind)
            for stream in (False, True):
                response = await one.http.post("/v1/chat/completions", json=chat(stream=stream))
                assert response.status_code == mapping.http_status
                assert response.json()["error"] == {
                    "message": "because",
                    "type": mapping.type,
                    "param": None,
                    "code": mapping.code,
                }
                needs_retry_after = issubclass(kind, Overloaded | Unavailable)
                assert ("retry-after" in response.headers) == needs_retry_after
    assert len(raised) > 15


async def test_defects_of_ours_keep_their_text_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        raise RuntimeError("secret detail")
        yield

    async with served(script) as one:
        response = await one.http.post("/v1/chat/completions", json=chat())
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret detail" in caplog.text


async def test_an_error_in_a_stream_is_an_object_then_done(tiny: Tokenizer) -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300])
        raise RankFailure("rank 3 died", 3)

    async with served(script) as one:
        response = await one.http.post("/v1/chat/completions", json=chat(stream=True))
        assert response.status_code == 200
        events = events_of(response.text)
        assert events[-1]["error"] == {
            "message": "rank 3 died", "type": "server_error", "param": None, "code": "rank_failure"
        }  # fmt: skip
        stream = await one.openai.chat.completions.create(model="m", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="rank 3 died"):
            async for _ in stream:
                pass


@pytest.mark.parametrize(("kind", "num_tries"), [(RequestFailure, 1), (RankFailure, 3)])
async def test_what_would_fail_again_is_not_sent_again_by_clients(kind: type[RemudaError], num_tries: int) -> None:
    """A request that breaks its gang must not come three times because of a client's habits."""
    raised: list[Request] = []

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        raised.append(request)
        raise kind("because")
        yield

    async with served(script) as one:
        with pytest.raises(openai.InternalServerError, match="because"):
            await one.openai.with_options(max_retries=2).completions.create(model="m", prompt="a")
    assert len(raised) == num_tries


async def test_overload_says_when_to_come_back() -> None:
    gate = Gate(after=[300])
    async with served(gate, max_live_sequences=1) as one:
        first = asyncio.create_task(one.http.post("/v1/completions", json=completion()))
        await one.backend.until(lambda: bool(one.backend.live))
        response = await one.http.post("/v1/completions", json=completion())
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        gate.opened.set()
        assert (await first).status_code == 200


async def test_keys(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalpha-of-the-herd\n\n  beta-of-the-herd \n")
    async with served(says([300]), key="beta-of-the-herd", api_key_file=path) as one:
        assert (await one.http.get("/v1/models")).status_code == 200
        assert [model.id async for model in one.openai.models.list()] == ["m"]
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic beta-of-the-herd"},
            {"authorization": "beta-of-the-herd"},
        ):
            async with httpx.AsyncClient(trust_env=False) as client:
                response = await client.get(f"{one.url}/v1/models", headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
                for open_path in ("/livez", "/readyz", "/health"):
                    assert (await client.get(f"{one.url}{open_path}", headers=headers)).status_code == 200
