"""The tokenizer alone, too, works within tenants' limits: over OpenAI's paths, Anthropic's and gRPC."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from tests.frontend.bodies import USER, completion
from tests.frontend.servers import Served
from tests.tenants.front_ends import bearer, endless, key_of, metadata, with_tenants

Ask = Callable[[Served, str], Awaitable[tuple[int, str]]]


def posting(path: str, body: dict[str, object]) -> Ask:
    async def ask(one: Served, key: str) -> tuple[int, str]:
        answer = await one.http.post(path, json=body, headers=bearer(key))
        return answer.status_code, answer.text

    return ask


def calling(method: str, request: object) -> Ask:
    async def ask(one: Served, key: str) -> tuple[int, str]:
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        try:
            await getattr(stub, method)(request, metadata=metadata(key))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return 429, error.details() or ""
        return 200, ""

    return ask


WAYS: dict[str, Ask] = {
    "tokenize": posting("/tokenize", {"prompt": "Hello"}),
    "of-nothing": posting("/tokenize", {"prompt": "", "add_special_tokens": False}),
    "detokenize": posting("/detokenize", {"tokens": [300, 301]}),
    "count-tokens": posting("/v1/messages/count_tokens", {"model": "m", "messages": USER}),
    "rpc-tokenize": calling("Tokenize", inference_pb2.TokenizeRequest(text="Hello")),
    "rpc-detokenize": calling("Detokenize", inference_pb2.DetokenizeRequest(token_ids=[300])),
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Ask:
    return WAYS[request.param]


async def test_it_counts_as_a_request_of_the_minute(way: Ask, tmp_path: Path) -> None:
    key, other = key_of(tmp_path, "small"), key_of(tmp_path, "other")
    async with with_tenants(tmp_path, "tenants: {small: {requests_per_minute: 1}}") as one:
        assert (await way(one, key))[0] == 200
        status, words = await way(one, key)
        assert status == 429 and "may make 1 requests a minute" in words
        assert (await way(one, other))[0] == 200
        refused = await one.http.post("/v1/completions", json=completion(), headers=bearer(key))
        assert refused.status_code == 429, "it is one bucket"
        assert refused.headers["x-ratelimit-limit-requests"] == "1"


async def test_it_counts_among_what_a_tenant_runs_at_once(way: Ask, tmp_path: Path) -> None:
    key, other = key_of(tmp_path, "slow"), key_of(tmp_path, "other")
    async with with_tenants(tmp_path, "tenants: {slow: {max_concurrent_requests: 1}}", endless) as one:
        body = completion(stream=True, max_tokens=50)
        async with one.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as running:
            assert running.status_code == 200
            status, words = await way(one, key)
            assert status == 429 and "1 requests running" in words
            assert (await way(one, other))[0] == 200
        while (await way(one, key))[0] == 429:  # noqa: ASYNC110  until the server has seen that the stream is left
            await asyncio.sleep(0.02)


async def test_it_leaves_a_sixteenth_of_the_room_to_others(way: Ask, tmp_path: Path) -> None:
    key, other = key_of(tmp_path, "greedy"), key_of(tmp_path, "other")
    async with with_tenants(tmp_path, "{}", endless, max_live_sequences=16) as one:
        body = completion(stream=True, n=15, max_tokens=5)
        async with one.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as running:
            assert running.status_code == 200
            status, words = await way(one, key)
            assert status == 429 and "tenant 'greedy' may have 15 live sequences" in words
            assert (await way(one, other))[0] == 200
            assert one.front_end.service.admission.num_requests == 1, "what is answered has left"
