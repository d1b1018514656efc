"""The official ``openai`` client, a plain gRPC client and the command line against a served cluster: Ray, a gang of two
ranks, leader, router and front end, all real."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.served import Served, listening_addresses, run_remuda

NAME_QUESTION = "My name is Zora. What is my name?"


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=60)


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until ``condition`` holds; fails after ``timeout_s``."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"not so within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - started_s


def _gauges(served: Served) -> dict[str, float]:
    replica = served.status()["replicas"][0]
    return {name: replica[name] for name in ("num_running", "num_waiting", "kv_cache_usage", "num_steps")}


def test_status_names_every_rank(served: Served) -> None:
    status = served.status()
    assert status["model"] == "remuda-tiny"
    (replica,) = status["replicas"]
    assert replica["state"] == "ready"
    assert [rank["rank"] for rank in replica["ranks"]] == [0, 1]
    for rank in replica["ranks"]:
        assert set(rank) == {
            *("rank", "pid", "host", "device", "state", "step", "operation", "since_s"),
            *("weight_bytes_from_peers", "weight_bytes_from_disk"),
        }
        assert rank["state"] in ("idle", "busy")
        assert psutil.pid_exists(rank["pid"])
    assert len({rank["pid"] for rank in replica["ranks"]}) == 2


def test_everything_listens_on_the_loopback_only(served: Served) -> None:
    listening = listening_addresses(served.mark)
    assert len(listening) >= 3  # Ray, the rendezvous store, the front end
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}, listening


def test_models_and_health(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["remuda-tiny"]
    for path in ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"):
        assert httpx.get(served.url + path).status_code == 200, path


def test_chat_answers_in_english_and_streams_the_same(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": NAME_QUESTION}]
    whole = client.chat.completions.create(model="remuda-tiny", messages=messages, temperature=0)  # type: ignore[call-overload]
    assert "Zora" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="remuda-tiny", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16, (
        "found in the prefix cache"
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == [
        "stop"
    ]


def test_grpc_and_http_give_the_same_tokens(served: Served, client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="remuda-tiny",
        prompt="The herd came down",
        max_tokens=24,
        temperature=0.9,
        seed=7,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    with grpc.insecure_channel(served.target) as channel:
        request = inference_pb2.GenerateRequest(
            text="The herd came down",
            sampling=common_pb2.SamplingParams(max_tokens=24, temperature=0.9, seed=7, ignore_eos=True),
        )
        responses = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60))
    assert responses[0].WhichOneof("event") == "started"
    assert responses[-1].WhichOneof("event") == "usage"
    deltas = [response.delta for response in responses if response.WhichOneof("event") == "delta"]
    assert "".join(delta.text for delta in deltas) == whole.choices[0].text
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert len(token_ids) == 24
    assert token_ids == whole.choices[0].token_ids  # type: ignore[attr-defined]
    assert responses[-1].usage.num_completion_tokens == 24


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"side": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
        "required": ["side", "far"],
        "additionalProperties": False,
    }
    wish: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    messages: Any = [{"role": "user", "content": NAME_QUESTION}]
    answer = client.chat.completions.create(model="remuda-tiny", messages=messages, response_format=wish, n=2, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert found["side"] in ("left", "right") and found["far"] in (True, False) and len(found) == 2
    with pytest.raises(openai.BadRequestError, match="at /properties/a: Invalid type: objekt"):
        client.chat.completions.create(
            model="remuda-tiny",
            messages=messages,
            extra_body={"guided_json": {"type": "object", "properties": {"a": {"type": "objekt"}}}},
        )


def test_grpc_health_and_reflection(served: Served) -> None:
    with grpc.insecure_channel(served.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "remuda.v1.Inference"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"remuda.v1.Inference", "remuda.v1.Admin", "grpc.health.v1.Health"} <= services


def test_choices_differ_and_seeds_repeat(client: openai.OpenAI) -> None:
    """Without deterministic mode the rest of a batch may round a number past the border of a drawn token: about once in
    a thousand of these requests it does. So each choice has to repeat in most of five answers; with seeds that do not
    count it would in none."""

    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model="remuda-tiny", prompt="Once upon a time", max_tokens=16, temperature=1.2, n=3, seed=seed
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    answers = [texts(1) for _ in range(5)]
    usual = []
    for of_choice in zip(*answers, strict=True):
        text, times = Counter(of_choice).most_common(1)[0]
        assert times >= 3, of_choice
        usual.append(text)
    assert len(set(usual)) > 1
    assert not set(texts(2)) & set(usual)


def test_concurrent_requests_equal_the_same_requests_alone(served: Served) -> None:
    prompts = [f"My name is {name}. What is my name?" for name in ("Zora", "Milo", "Tarin", "Ulka", "Bero", "Sima")]

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "remuda-tiny", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        answer = await client.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
        content: str = answer.json()["choices"][0]["message"]["content"]
        return content

    async def together() -> list[str]:
        async with httpx.AsyncClient() as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    async def alone() -> list[str]:
        async with httpx.AsyncClient() as client:
            return [await ask(client, prompt) for prompt in prompts]

    assert asyncio.run(together()) == asyncio.run(alone())


def test_a_client_that_goes_away_stops_the_work(served: Served) -> None:
    body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        assert _gauges(served)["num_running"] == 1
    seconds = _wait_until(lambda: _gauges(served)["num_running"] == 0, 5)
    print(f"work stopped within {seconds:.2f} s of the disconnect")
    assert _gauges(served)["kv_cache_usage"] == 0
    num_steps = _gauges(served)["num_steps"]
    assert _gauges(served)["num_steps"] == num_steps


def test_a_cancelled_grpc_call_stops_the_work(served: Served) -> None:
    with grpc.insecure_channel(served.target) as channel:
        request = inference_pb2.GenerateRequest(
            text="Once", sampling=common_pb2.SamplingParams(max_tokens=1500, ignore_eos=True)
        )
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)
        while next(call).WhichOneof("event") != "delta":
            pass
        call.cancel()
        _wait_until(lambda: _gauges(served)["num_running"] == 0, 5)
    assert _gauges(served)["kv_cache_usage"] == 0


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "model_not_found", None),
        ({"model": "remuda-tiny", "prompt": "x", "temperature": -1}, 400, "invalid_value", "temperature"),
        ({"model": "remuda-tiny", "prompt": "x", "max_tokens": "many"}, 400, None, "max_tokens"),
        ({"model": "remuda-tiny", "prompt": [99999999]}, 400, "invalid_value", "prompt"),
        ({"model": "remuda-tiny", "prompt": "x " * 20000}, 400, "context_length_exceeded", None),
        ({"model": "remuda-tiny"}, 400, None, "prompt"),
    ],
)
def test_bad_input_is_refused_with_its_field(
    served: Served, body: dict[str, object], status: int, code: str | None, param: str | None
) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["message"]
    assert isinstance(error["code"], str)
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param


def test_broken_json_is_refused(served: Served) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/completions", content=b'{"model": ', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_the_command_line_talks_to_it(served: Served) -> None:
    asked = run_remuda("chat", NAME_QUESTION, "--target", served.target, "--temperature", "0")
    assert asked.returncode == 0, asked.stderr
    assert "Zora" in asked.stdout
    assert "tokens/s" in asked.stderr
    generated = run_remuda("generate", "The herd", "--max-tokens", "5", "--json", "--target", served.target)
    answer = json.loads(generated.stdout)
    assert answer["num_completion_tokens"] == 5 == len(answer["token_ids"])
    bad = run_remuda("generate", "x", "--temperature", "-3", "--target", served.target)
    assert bad.returncode == 2
    assert "temperature" in bad.stderr
    assert bad.stderr.count("\n") == 1
