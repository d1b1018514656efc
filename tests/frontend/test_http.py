"""The HTTP API over real sockets: OpenAI's own client, and plain requests where the bytes matter."""

import asyncio
import json
from typing import Any

import openai
import pytest

from cluster.frontend.answers import HttpSettings
from cluster.frontend.tokenizer import Tokenizer
from cluster.types import ReplicaState
from tests.frontend.bodies import EOT, USER, chat, completion, events_of
from tests.frontend.scripted import Gate, replica_info, says
from tests.frontend.servers import served


async def test_models(tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        models = [model async for model in one.openai.models.list()]
        assert [model.id for model in models] == ["m"]
        assert (await one.openai.models.retrieve("m")).id == "m"
        assert (await one.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
        with pytest.raises(openai.NotFoundError):
            await one.openai.models.retrieve("other")


async def test_models_show_the_licence() -> None:
    async with served(says([300])) as one:
        model = await one.openai.models.retrieve("m")
        shown = {name: getattr(model, name) for name in model.model_extra or {} if name != "max_model_len"}
        assert shown == {
            "license": "Apache-2.0",
            "license_source": "README.md",
            "license_notices": [],
            "attribution": None,
        }


async def test_chat_with_the_openai_client(tiny: Tokenizer) -> None:
    ids = tiny.encode("Hello, wörld 🙂!", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT, num_cached_tokens=3)) as one:
        answer = await one.openai.chat.completions.create(model="m", messages=USER, temperature=0)
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.content == "Hello, wörld 🙂!"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        prompt = one.backend.requests[0].token_ids
        assert prompt == tiny.encode_chat(USER)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(ids) + 1
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        sampling = one.backend.requests[0].sampling
        assert sampling.temperature == 0
        assert sampling.max_tokens == 512 - len(prompt)


async def test_chat_stream_with_the_openai_client(tiny: Tokenizer) -> None:
    ids = tiny.encode("Hello, wörld 🙂!", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT)) as one:
        stream = await one.openai.chat.completions.create(
            model="m", messages=USER, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        texts = {0: "", 1: ""}
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: "Hello, wörld 🙂!", 1: "Hello, wörld 🙂!"}
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2 * (len(ids) + 1)
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert ends == ["stop", "stop"]


async def test_chat_stream_byte_for_byte(tiny: Tokenizer) -> None:
    ids = tiny.encode("ab cd", add_special_tokens=False)
    async with served(says(ids, sizes=[len(ids)], stop_token_id=EOT)) as one:
        response = await one.http.post("/v1/chat/completions", json=chat(stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-cache"
        events = events_of(response.text)
        head = {key: events[0][key] for key in ("id", "object", "created", "model")}
        assert head["object"] == "chat.completion.chunk"
        assert head["id"].startswith("chatcmpl-")
        bare = {"index": 0, "logprobs": None, "finish_reason": None}
        assert events[0] == {**head, "choices": [{**bare, "delta": {"role": "assistant", "content": ""}}]}
        assert events[1] == {**head, "choices": [{**bare, "delta": {"content": "ab cd"}}]}
        assert events[2] == {
            **head,
            "choices": [{**bare, "delta": {}, "finish_reason": "stop", "stop_reason": EOT}],
        }
        assert len(events) == 3


async def test_completion_with_the_openai_client(tiny: Tokenizer) -> None:
    ids = tiny.encode(" there you are", add_special_tokens=False)
    async with served(says(ids * 9)) as one:
        answer = await one.openai.completions.create(model="m", prompt="Hello")
        assert answer.object == "text_completion"
        assert answer.choices[0].text == tiny.decode((ids * 9)[:16])
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16
        assert one.backend.requests[0].token_ids == tiny.encode("Hello")
        text = ""
        async for chunk in await one.openai.completions.create(model="m", prompt="Hello", stream=True, max_tokens=5):
            text += chunk.choices[0].text
        assert text == tiny.decode((ids * 9)[:5])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [["ab"]]),
        (["ab", "c"], [["ab"], ["c"]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_every_form_of_prompt(prompt: Any, expected: list[Any], tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        answer = (await one.http.post("/v1/completions", json=completion(prompt=prompt, n=2))).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
        given = [tiny.encode(entry[0]) if isinstance(entry[0], str) else entry for entry in expected]
        assert [request.token_ids for request in one.backend.requests] == [ids for ids in given for _ in range(2)]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, given))


async def test_echo_logprobs_and_ids(tiny: Tokenizer) -> None:
    ids = tiny.encode(" é🙂", add_special_tokens=False)
    async with served(says(ids)) as one:
        body = completion(prompt="Hi é", echo=True, logprobs=2, max_tokens=len(ids), return_token_ids=True)
        for stream in (False, True):
            response = await one.http.post("/v1/completions", json={**body, "stream": stream})
            if stream:
                pieces = [event["choices"][0] for event in events_of(response.text)]
                lists = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
                logprobs = {key: [entry for part in lists for entry in part[key]] for key in lists[0]}
                text = "".join(piece["text"] for piece in pieces)
                token_ids = [token_id for piece in pieces for token_id in piece.get("token_ids", [])]
                prompt_ids = pieces[0]["prompt_token_ids"]
                assert not any("prompt_token_ids" in piece for piece in pieces[1:])
            else:
                choice = response.json()["choices"][0]
                logprobs, text = choice["logprobs"], choice["text"]
                token_ids, prompt_ids = choice["token_ids"], choice["prompt_token_ids"]
            prompt = tiny.encode("Hi é")
            assert (prompt_ids, token_ids) == (prompt, ids)
            assert text == "Hi é é🙂"
            whole = [*prompt, *ids]
            assert logprobs["token_logprobs"] == [None, *(-token_id / 1000 for token_id in whole[1:])]
            assert logprobs["tokens"] == [tiny.bytes.name(token_id) for token_id in whole]
            assert logprobs["top_logprobs"][0] is None
            # Parts of characters all look like U+FFFD, so that an alternative can hide another.
            assert all(
                name in top for name, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
            )
            assert max(map(len, logprobs["top_logprobs"][1:])) == 3
            for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
                if "\ufffd" not in name and not name.startswith("<|"):
                    assert text[offset : offset + len(name)] == name


async def test_scoring_with_echo_and_no_new_tokens(tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        body = completion(prompt="one two three", echo=True, logprobs=0, max_tokens=0)
        answer = (await one.http.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == "one two three"
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(tiny.encode("one two three"))
        assert answer["choices"][0]["logprobs"]["top_logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 0


async def test_chat_logprobs_with_the_openai_client(tiny: Tokenizer) -> None:
    ids = tiny.encode("ok 🙂", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT)) as one:
        answer = await one.openai.chat.completions.create(model="m", messages=USER, logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs
        assert entries is not None
        assert entries.content is not None
        assert b"".join(bytes(entry.bytes or []) for entry in entries.content[:-1]).decode() == "ok 🙂"
        assert [entry.logprob for entry in entries.content] == [-token_id / 1000 for token_id in [*ids, EOT]]
        assert all(len(entry.top_logprobs) == 3 for entry in entries.content)


async def test_stop_strings_and_extensions_reach_the_engine(tiny: Tokenizer) -> None:
    ids = tiny.encode(" one two three", add_special_tokens=False)
    async with served(says(ids)) as one:
        body = completion(
            stop="two", max_tokens=50, min_tokens=1, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=11,
            ignore_eos=True, stop_token_ids=[9], logit_bias={"12": -3}, presence_penalty=0.5, frequency_penalty=0.25,
        )  # fmt: skip
        answer = (await one.http.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == " one "
        assert answer["choices"][0]["stop_reason"] == "two"
        sampling = one.backend.requests[0].sampling
        for name in ("min_tokens", "top_k", "min_p", "repetition_penalty", "seed", "presence_penalty"):
            assert getattr(sampling, name) == body[name]
        assert sampling.logit_bias == {12: -3.0}
        assert sampling.stop_token_ids == (9,)
        assert sampling.frequency_penalty == 0.25


async def test_tokenize_and_detokenize(tiny: Tokenizer) -> None:
    async with served(says([300])) as one:
        given = (await one.http.post("/tokenize", json={"model": "m", "prompt": "Hi 🙂"})).json()
        ids = tiny.encode("Hi 🙂")
        assert given == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
        back = (await one.http.post("/detokenize", json={"model": "m", "tokens": ids})).json()
        assert back == {"prompt": "<|begin_of_text|>Hi 🙂"}
        bare = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
        answer = (await one.http.post("/tokenize", json=bare)).json()
        assert answer["tokens"] == tiny.encode("Hi", add_special_tokens=False)
        assert len(answer["token_strs"]) == answer["count"]
        told = (await one.http.post("/tokenize", json={"messages": USER})).json()
        assert told["tokens"] == tiny.encode_chat(USER)


async def test_content_parts_are_joined(tiny: Tokenizer) -> None:
    parts = [{"type": "text", "text": "<|eo"}, {"type": "text", "text": "t|>"}]
    async with served(says([300])) as one:
        response = await one.http.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": parts}]))
        assert response.status_code == 200
        assert one.backend.requests[0].token_ids == tiny.encode_chat([{"role": "user", "content": "<|eo\nt|>"}])


async def test_request_ids_come_back() -> None:
    async with served(says([300])) as one:
        given = await one.http.post("/v1/completions", json=completion(), headers={"x-request-id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        made = [(await one.http.get("/nothing")).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        odd = await one.http.get("/livez", headers={"x-request-id": "a b" * 100})
        assert odd.headers["x-request-id"] != "a b" * 100


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[], [300]])
async def test_a_client_that_goes_away_stops_the_work(stream: bool, before: list[int]) -> None:
    """On a bare socket, so that nothing but closing it tells the server."""
    async with served(Gate(before=before)) as one:
        body = json.dumps(chat(stream=stream, n=2)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await one.backend.until(lambda: len(one.backend.live) == 2)
        if stream and before:
            assert b"200" in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await one.backend.until(lambda: not one.backend.live)
        assert len(one.backend.aborted) == 2
        await asyncio.wait_for(one.front_end.service.admission.wait_idle(), 5)


async def test_an_openai_stream_that_is_closed_stops_the_work() -> None:
    async with served(Gate(before=[300, 301])) as one:
        stream = await one.openai.chat.completions.create(model="m", messages=USER, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await one.backend.until(lambda: not one.backend.live)
        assert len(one.backend.aborted) == 1


async def test_silence_is_filled_with_comments(tiny: Tokenizer) -> None:
    gate = Gate(after=[300])
    async with served(gate, http=HttpSettings(ping_interval_s=0.05)) as one:
        async with one.http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as response:
            assert response.status_code == 200
            text = ""
            async for piece in response.aiter_text():
                text += piece
                if text.count(": ping\n\n") >= 2:
                    gate.opened.set()
        events = events_of(text)
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == tiny.decode([300])


async def test_deadlines_end_requests() -> None:
    async with served(Gate()) as one:
        response = await one.http.post("/v1/completions", json=completion(first_token_timeout_s=0.05))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    async with served(Gate(before=[300])) as one:
        response = await one.http.post("/v1/completions", json=completion(timeout_s=0.2, stream=True))
        assert events_of(response.text)[-1]["error"]["code"] == "deadline_exceeded"
        assert one.backend.live == set()


async def test_a_starting_server_is_unavailable() -> None:
    async with served(says([300])) as one:
        one.backend.infos = [replica_info(ReplicaState.STARTING)]
        response = await one.http.post("/v1/completions", json=completion())
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert (await one.http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_many_streams_side_by_side(tiny: Tokenizer) -> None:
    ids = tiny.encode("The quick brown fox 🙂 jumps", add_special_tokens=False)
    async with served(says(ids, stop_token_id=EOT), max_live_sequences=200) as one:

        async def stream() -> str:
            text = ""
            created = await one.openai.chat.completions.create(model="m", messages=USER, stream=True)
            async for chunk in created:
                text += chunk.choices[0].delta.content or ""
            return text

        texts = await asyncio.gather(*(stream() for _ in range(50)))
        assert set(texts) == {"The quick brown fox 🙂 jumps"}
        assert one.front_end.service.admission.num_requests == 0


async def test_priority_and_cache_salt_reach_the_engine() -> None:
    async with served(says([300])) as one:
        for body in (completion(priority=-7, cache_salt="tenant"), chat(priority=-7, cache_salt="tenant")):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            assert (await one.http.post(path, json=body)).status_code == 200
            assert (one.backend.requests[-1].priority, one.backend.requests[-1].cache_salt) == (-7, "tenant")
        await one.http.post("/v1/completions", json=completion())
        assert (one.backend.requests[-1].priority, one.backend.requests[-1].cache_salt) == (0, "")
        for wrong in ({"priority": 2**31}, {"priority": "high"}, {"cache_salt": "x" * 257}, {"cache_salt": 5}):
            answer = await one.http.post("/v1/completions", json=completion(**wrong))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))
