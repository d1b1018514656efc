"""Tenants at a running front end, over HTTP and gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.request import Tenant
from tests.frontend.bodies import chat, completion
from tests.frontend.scripted import Script
from tests.frontend.servers import Served
from tests.tenants.front_ends import bearer, endless, key_of, with_tenants
from tests.tenants.redis_server import RedisServer

TENANTS = """
default: {requests_per_minute: 1000}
tenants:
  small: {requests_per_minute: 3, tokens_per_minute: 200}
  narrow: {models: [other]}
  slow: {max_concurrent_requests: 1, weight: 2.5, priority: -3}
"""


@asynccontextmanager
async def shared(folder: Path, script: Script | None = None, **tenancy: Any) -> AsyncIterator[Served]:
    async with with_tenants(folder, TENANTS, script, **tenancy) as one:
        yield one


async def test_limits_over_http(tmp_path: Path) -> None:
    small, ops = key_of(tmp_path, "small"), key_of(tmp_path, "ops", "--scope", "metrics")
    async with shared(tmp_path) as one:
        answer = await one.http.post("/v1/completions", json=completion(max_tokens=50), headers=bearer(small))
        assert answer.status_code == 200
        num_prompt = answer.json()["usage"]["prompt_tokens"]
        headers = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")}
        assert set(headers) == {
            f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
        }
        assert headers["x-ratelimit-limit-requests"] == "3" and headers["x-ratelimit-remaining-requests"] == "2"
        assert headers["x-ratelimit-remaining-tokens"] == str(200 - 50 - num_prompt)
        second = await one.http.post("/v1/completions", json=completion(max_tokens=1), headers=bearer(small))
        assert int(second.headers["x-ratelimit-remaining-tokens"]) >= 200 - 2 * num_prompt - 3 - 1, "the rest came back"
        too_much = await one.http.post("/v1/completions", json=completion(max_tokens=195), headers=bearer(small))
        assert too_much.status_code == 429 and "200 tokens a minute" in too_much.json()["error"]["message"]
        refused = await one.http.post("/v1/completions", json=completion(stream=True), headers=bearer(small))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        ollama = await one.http.post("/api/generate", json={"model": "m", "prompt": "x"}, headers=bearer(small))
        assert ollama.status_code == 429 and isinstance(ollama.json()["error"], str)
        client = one.openai.with_options(api_key=small)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="m", prompt="x")
        assert caught.value.response.headers["retry-after"]
        metrics = (await one.http.get("/metrics", headers=bearer(ops))).text
        assert 'remuda_tenant_limit_refusals_total{tenant="small"}' in metrics


async def test_limits_over_grpc(tmp_path: Path) -> None:
    small = key_of(tmp_path, "small")
    async with shared(tmp_path) as one:
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        request = inference_pb2.GenerateRequest(text="x", sampling=common_pb2.SamplingParams(max_tokens=1))

        async def ask() -> None:
            async for _ in stub.Generate(request, metadata=(("authorization", f"Bearer {small}"),)):
                pass

        for _ in range(3):
            await ask()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata() or ())
        assert 1 < float(trailers["remuda-retry-after-s"]) <= 20
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        info = error_details_pb2.RetryInfo()
        assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] and status.details[0].Unpack(info)
        assert info.retry_delay.ToMilliseconds() == pytest.approx(1000 * float(trailers["remuda-retry-after-s"]), abs=2)


async def test_models_that_a_tenant_may_not_use_are_hidden_and_refused(tmp_path: Path) -> None:
    narrow, wide = key_of(tmp_path, "narrow"), key_of(tmp_path, "wide")
    async with shared(tmp_path) as one:
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = completion() if path == "/v1/completions" else chat()
            answer = await one.http.post(path, json=body, headers=bearer(narrow))
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "permission_denied"
            assert (await one.http.post(path, json=body, headers=bearer(wide))).status_code == 200
        assert (await one.http.get("/v1/models", headers=bearer(narrow))).json()["data"] == []
        assert (await one.http.get("/v1/models/m", headers=bearer(narrow))).status_code == 403
        assert (await one.http.get("/api/tags", headers=bearer(narrow))).json()["models"] == []
        assert len((await one.http.get("/v1/models", headers=bearer(wide))).json()["data"]) == 1
        tokens = await one.http.post("/tokenize", json={"prompt": "x"}, headers=bearer(narrow))
        assert tokens.status_code == 403
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        listed = await stub.ListModels(
            inference_pb2.ListModelsRequest(), metadata=(("authorization", f"Bearer {narrow}"),)
        )
        assert not listed.models


async def test_the_engine_knows_whose_request_it_is_and_a_changed_file_holds(tmp_path: Path) -> None:
    slow = key_of(tmp_path, "slow")
    async with shared(tmp_path) as one:
        await one.http.post("/v1/completions", json=completion(), headers=bearer(slow))
        assert one.backend.requests[-1].tenant == Tenant("slow", 2.5, -3)
        (tmp_path / "tenants.yaml").write_text("tenants: {slow: {requests_per_minute: 1, weight: 7}}")
        async with asyncio.timeout(5):
            while one.backend.requests[-1].tenant.weight != 7:
                await asyncio.sleep(0.05)
                await one.http.post("/v1/completions", json=completion(), headers=bearer(slow))
        # The first of the new weight may have been let in by the old limits, while the file was read.
        more = [await one.http.post("/v1/completions", json=completion(), headers=bearer(slow)) for _ in range(2)]
        assert more[-1].status_code == 429


async def usage(one: Served, key: str, **params: str) -> list[dict[str, Any]]:
    answer = await one.http.get("/v1/usage", headers=bearer(key), params=params)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


async def test_embeddings_are_limited_and_counted_like_prompts(tmp_path: Path) -> None:
    small, narrow = key_of(tmp_path, "small"), key_of(tmp_path, "narrow")
    body = {"model": "m", "input": ["a few words", "and more"]}
    async with shared(tmp_path) as one:
        answer = await one.http.post("/v1/embeddings", json=body, headers=bearer(small))
        num_tokens = answer.json()["usage"]["prompt_tokens"]
        assert num_tokens > 4 and answer.headers["x-ratelimit-remaining-tokens"] == str(200 - num_tokens)
        (mine,) = await usage(one, small)
        assert (mine["num_requests"], mine["num_prompt_tokens"], mine["num_completion_tokens"]) == (1, num_tokens, 0)
        assert (await one.http.post("/v1/embeddings", json=body, headers=bearer(narrow))).status_code == 403
        long = await one.http.post("/api/embed", json={"model": "m", "input": "word " * 300}, headers=bearer(small))
        assert long.status_code == 400 and "200 tokens" in long.json()["error"]


async def test_usage_is_told_to_whom_it_concerns_and_logged_without_text(tmp_path: Path) -> None:
    usage_log, audit_log = tmp_path / "usage.jsonl", tmp_path / "audit.jsonl"
    one_key, other_key = key_of(tmp_path, "one"), key_of(tmp_path, "two")
    admin = key_of(tmp_path, "ops", "--scope", "admin")
    narrow = key_of(tmp_path, "narrow")
    async with shared(tmp_path, usage_log=usage_log, audit_log=audit_log) as one:
        for key in (one_key, one_key, other_key):
            body = completion(prompt="very secret words", n=2)
            answer = (await one.http.post("/v1/completions", json=body, headers=bearer(key))).json()
        num_prompt = answer["usage"]["prompt_tokens"]
        await one.http.post("/v1/completions", json=completion(), headers=bearer(narrow))
        strange = b'{"model": "\\ud800' + b"x" * 10_000 + b'", "prompt": "a"}'
        refused = await one.http.post("/v1/completions", headers=bearer(one_key), content=strange)
        assert refused.status_code == 400
        unknown = completion(model="\U0001f40e" * 10_000)
        assert (await one.http.post("/v1/completions", headers=bearer(one_key), json=unknown)).status_code == 404
        mine = await usage(one, one_key)
        assert [(each["tenant"], each["num_requests"], each["num_prompt_tokens"]) for each in mine] == [
            ("one", 2, 2 * num_prompt)
        ]
        assert mine[0]["num_completion_tokens"] == 2 * 2 * 3 and mine[0]["model"] == "m"
        assert (await one.http.get("/v1/usage?tenant=two", headers=bearer(one_key))).status_code == 403
        assert (await one.http.get("/v1/usage?day=yesterday", headers=bearer(one_key))).status_code == 400
        assert (await one.http.get("/v1/usage")).status_code == 401
        assert [each["tenant"] for each in await usage(one, admin)] == ["one", "two"]
        assert [each["num_requests"] for each in await usage(one, admin, tenant="two")] == [1]
        assert await usage(one, admin, day="2020-01-01") == []
    lines = [json.loads(line) for line in usage_log.read_text().splitlines()]
    assert [(line["tenant"], line["num_prompt_tokens"]) for line in lines] == [
        ("one", num_prompt),
        ("one", num_prompt),
        ("two", num_prompt),
    ]
    audit = [json.loads(line) for line in audit_log.read_text().splitlines()]
    completions, usages = "POST /v1/completions", "GET /v1/usage"
    assert [(line["route"], line["tenant"], line["status"], line["outcome"]) for line in audit] == [
        *[(completions, "one", 200, "completed")] * 2,
        (completions, "two", 200, "completed"),
        (completions, "narrow", 403, "PermissionDenied"),
        (completions, "one", 400, "InvalidRequest"),
        (completions, "one", 404, "ModelNotFound"),
        (usages, "one", 200, "completed"),
        (usages, "one", 403, "PermissionDenied"),
        (usages, "one", 400, "InvalidRequest"),
        (usages, "", 401, "Unauthenticated"),
        *[(usages, "ops", 200, "completed")] * 3,
    ]
    calls = [line for line in audit if "call_id" in line]
    assert [audit.index(line) for line in calls] == [0, 1, 2, 3, 5], "those that reached the model's path"
    counts = ("num_prompt_tokens", "num_completion_tokens")
    assert [tuple(line[count] for count in counts) for line in calls] == [(num_prompt, 6)] * 3 + [(0, 0)] * 2
    assert [line["call_id"] for line in calls[:3]] == [line["request_id"] for line in lines]
    assert max(len(line) for line in audit_log.read_text().splitlines()) < 1000
    assert all(line["key_id"] or line["status"] == 401 for line in audit)
    for path in (usage_log, audit_log):
        assert "secret" not in path.read_text() and one_key not in path.read_text()


async def test_a_stream_that_its_client_leaves_counts_what_came(tmp_path: Path) -> None:
    key = key_of(tmp_path, "slow")
    async with shared(tmp_path, endless, usage_log=tmp_path / "usage.jsonl") as one:
        body = completion(stream=True, return_token_ids=True)
        async with one.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as response:
            num_tokens = 0
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    num_tokens += len(json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or ())
                if num_tokens == 5:
                    break
            busy = await one.http.post("/v1/completions", json=body, headers=bearer(key))
            assert busy.status_code == 429, "one at a time"
        async with asyncio.timeout(5):
            while not (found := await usage(one, key)):  # noqa: ASYNC110  another connection's end
                await asyncio.sleep(0.02)
        assert found[0]["num_completion_tokens"] == 5 and found[0]["num_prompt_tokens"] > 0
        async with AsyncExitStack() as stack:
            again = one.http.stream("POST", "/v1/completions", json=body, headers=bearer(key))
            assert (await stack.enter_async_context(again)).status_code == 200, "and its place is free"
    (line, last) = map(json.loads, (tmp_path / "usage.jsonl").read_text().splitlines())
    assert line["outcome"] == "cancelled" and last["request_id"] != line["request_id"]


async def test_two_front_ends_hold_one_limit_and_count_together(tmp_path: Path, redis_server: RedisServer) -> None:
    small, admin = key_of(tmp_path, "small"), key_of(tmp_path, "ops", "--scope", "admin")
    store: dict[str, Any] = {"limits_store": redis_server.url, "limits_store_password_file": redis_server.password_file}
    async with shared(tmp_path, **store) as one, shared(tmp_path, **store) as two:
        body = completion(max_tokens=3)
        answers = [await each.http.post("/v1/completions", json=body, headers=bearer(small)) for each in (one, two) * 2]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [(each["tenant"], each["num_requests"]) for each in await usage(two, admin)] == [("small", 3)]
        redis_server.stop()
        answer = await one.http.post("/v1/completions", json=body, headers=bearer(small))
        assert answer.status_code == 200, "by its own limits"
        assert (await one.http.get("/v1/usage", headers=bearer(admin))).status_code == 503
