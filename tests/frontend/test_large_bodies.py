"""Bodies that are legal in size: what they hold decides what they may cost, and everybody else goes on."""

import asyncio
import json
import time
from typing import Any

import pytest

from cluster.frontend.answers import HttpSettings
from cluster.frontend.http_body import MAX_CONTAINERS, MAX_STRINGS, parse_body
from cluster.frontend.openai_schema import MAX_PROMPTS, ChatBody, CompletionBody, DetokenizeBody
from engine.errors import InvalidRequest
from tests.frontend.bodies import USER, chat, completion
from tests.frontend.scripted import replica_info, says
from tests.frontend.servers import served

NUM_BYTES = HttpSettings().max_body_bytes - 100


def filled(start: bytes, unit: bytes, end: bytes) -> bytes:
    return start + unit * ((NUM_BYTES - len(start) - len(end)) // len(unit)) + unit[:-1] + end


@pytest.mark.parametrize(
    "body",
    [
        filled(b'{"prompt":[', b"[2],", b"]}"),
        filled(b'{"prompt":"a","other":[', b"[],", b"]}"),
        filled(b'{"prompt":[', b'"",', b"]}"),
        filled(b'{"prompt":[', b"2,", b"]}"),
        filled(b'{"prompt":"a","stop":[', b"2,", b"]}"),
        filled(b'{"prompt":"\\\\\\"","other":[', b"{},", b"]}"),
        filled(b'{"prompt":[[', b"1],[", b"2]]}"),
    ],
    ids=["lists of ids", "unknown field", "strings", "ids", "stops", "after escapes", "twice"],
)
async def test_nothing_waits_for_a_body(body: bytes) -> None:
    """The bound is a tenth of what parsing alone took, and far above what the check takes on a slow machine."""
    async with served(says([300])) as one:
        longest_s = 0.0

        async def watch() -> None:
            nonlocal longest_s
            while True:
                before_s = time.perf_counter()
                await asyncio.sleep(0.01)
                longest_s = max(longest_s, time.perf_counter() - before_s)

        watching = asyncio.create_task(watch())
        response = await one.http.post("/v1/completions", content=body)
        watching.cancel()
        assert response.status_code == 400
        assert len(response.content) < 1000
        assert longest_s < 1.0


@pytest.mark.parametrize("num_tokens", [128_000, 1_000_000])
async def test_long_prompts_of_ids_are_taken(num_tokens: int) -> None:
    async with served(says([300])) as one:
        one.backend.infos = [replica_info(max_model_len=2 * num_tokens)]
        body = completion(prompt=[2 + index % 2000 for index in range(num_tokens)], max_tokens=1)
        assert (await one.http.post("/v1/completions", json=body)).status_code == 200
        assert len(one.backend.requests[0].token_ids) == num_tokens


async def test_long_prompts_of_text_are_taken() -> None:
    """Code with every character that JSON escapes, and more brackets and quotes than the bound on real ones."""
    text = 'if (a[0] == "\\n") { b["x"] = [{}]; } // größe\n' * 16_000
    assert text.count("[") + text.count("{") > MAX_CONTAINERS
    assert text.count('"') > MAX_STRINGS / 4
    async with served(says([300])) as one:
        one.backend.infos = [replica_info(max_model_len=4_000_000)]
        for path, body in (
            ("/v1/completions", completion(prompt=text)),
            ("/v1/chat/completions", chat(messages=[{"role": "user", "content": text}])),
        ):
            assert (await one.http.post(path, content=json.dumps(body))).status_code == 200
        counted = (await one.http.post("/tokenize", json={"prompt": text})).json()["count"]
        assert counted > 128_000
        assert len(one.backend.requests[0].token_ids) == counted


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, completion(prompt=[[2, 3]] * MAX_PROMPTS, logit_bias={str(i): 1 for i in range(100_000)})),
        (ChatBody, chat(messages=[*USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}] * 2000)),
        (DetokenizeBody, {"tokens": list(range(1_000_000))}),
    ],
)
def test_wide_bodies_are_taken(kind: Any, body: dict[str, Any]) -> None:
    parse_body(kind, json.dumps(body).encode())


@pytest.mark.parametrize("text", ['"', "\\", '\\"', '"[', "[{,", '\\\\"', "😀"])
def test_what_strings_hold_does_not_count(text: str) -> None:
    body = json.dumps({"prompt": text * 300_000}).encode()
    assert parse_body(CompletionBody, body).prompt == text * 300_000
    with pytest.raises(InvalidRequest, match="lists and objects"):
        parse_body(CompletionBody, body[:-1] + b',"x":[' + b"[]," * MAX_CONTAINERS + b"[]]}")


async def test_a_body_over_the_bound_is_too_large() -> None:
    async with served(says([300])) as one:
        response = await one.http.post("/v1/completions", content=b" " * (HttpSettings().max_body_bytes + 1))
        assert response.status_code == 413
        assert str(HttpSettings().max_body_bytes) in response.json()["error"]["message"]
