"""Embeddings over every API, computed by remuda-tiny and held against transformers."""

import base64
from collections.abc import Iterator
from functools import cache
from typing import Any

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from cluster.frontend.embedding import MAX_AT_ONCE, MAX_INPUTS
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from cluster.rpc.generated.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from engine.request import Pooling
from tests.frontend.real_engine import RealBackend
from tests.frontend.scripted import Gate, ScriptedBackend, embedding_of, says
from tests.frontend.servers import TINY, Served, served
from tests.frontend.threaded import serving

TEXTS = ["Once upon a time", "there was a remuda, the herd from which each day's mounts are chosen. " * 8]
HIDDEN_SIZE = 256


@pytest.fixture(scope="module", params=list(Pooling))
def one(request: pytest.FixtureRequest) -> Iterator[Served]:
    backend = RealBackend(TINY, kv_cache_bytes=32 * 2**20)
    try:
        with serving(backend, pooling=request.param) as running:
            running.pooling = request.param  # type: ignore[attr-defined]
            yield running
    finally:
        backend.close()


@pytest.fixture
def http(one: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=one.url, timeout=30, trust_env=False) as client:
        yield client


@cache
def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(Tokenizer(read_model_files(TINY)).encode(text, True))


@cache
@torch.no_grad()
def expected(text: str, pooling: Pooling) -> npt.NDArray[np.float32]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    states = model(torch.tensor([tokens_of(text)]), output_hidden_states=True).hidden_states[-1][0]
    vector = states[-1] if pooling is Pooling.LAST else states.mean(0)
    unit: npt.NDArray[np.float32] = (vector / vector.norm()).numpy()
    return unit


def embed(http: httpx.Client, given: Any, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/embeddings", json={"model": "m", "input": given, **fields})
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    assert shown["object"] == "list" and shown["model"] == "m"
    assert [(each["object"], each["index"]) for each in shown["data"]] == [
        ("embedding", index) for index in range(len(shown["data"]))
    ]
    return shown


def vectors(shown: dict[str, Any]) -> list[Any]:
    return [each["embedding"] for each in shown["data"]]


def test_every_form_of_input_is_what_transformers_computes(one: Served, http: httpx.Client) -> None:
    both = embed(http, TEXTS)
    num_tokens = sum(len(tokens_of(text)) for text in TEXTS)
    assert both["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for text, vector in zip(TEXTS, vectors(both), strict=True):
        assert vector == pytest.approx(expected(text, one.pooling), abs=1e-4)  # type: ignore[attr-defined]
    ids = [list(tokens_of(text)) for text in TEXTS]
    for given in (ids, TEXTS):
        assert np.allclose(vectors(embed(http, given)), vectors(both), atol=1e-6)
    for given in (ids[1], TEXTS[1]):
        assert np.allclose(vectors(embed(http, given)), vectors(both)[1:], atol=1e-6)


def test_base64_and_fewer_dimensions(http: httpx.Client) -> None:
    whole = np.array(vectors(embed(http, TEXTS, encoding_format="float", user="somebody")))
    coded = [
        np.frombuffer(base64.b64decode(each), "<f4") for each in vectors(embed(http, TEXTS, encoding_format="base64"))
    ]
    assert np.allclose(coded, whole, atol=1e-6)
    some = np.array(vectors(embed(http, TEXTS, dimensions=32)))
    assert some.shape == (2, 32) and np.allclose(np.linalg.norm(some, axis=1), 1, atol=1e-5)
    assert np.allclose(some, whole[:, :32] / np.linalg.norm(whole[:, :32], axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [5, 10**6]}, "input"),
        ({"input": [[5], [-1]]}, "input"),
        ({"input": [5] * 5000}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": "another"}, None),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], param: str | None) -> None:
    async with served(says([])) as front:
        answer = await front.http.post("/v1/embeddings", json={"model": "m", **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400 if param else 404, param), error
        assert not front.backend.requests


def test_many_inputs_come_in_their_order(http: httpx.Client) -> None:
    """More than the engine has at a time, and many more than it has slots for."""
    texts = [f"number {index % 7}" for index in range(4 * MAX_AT_ONCE)]
    found = np.array(vectors(embed(http, texts)))
    alone = np.array(vectors(embed(http, texts[:7])))
    assert np.allclose(found, alone[[index % 7 for index in range(len(texts))]], atol=1e-5)
    assert len(np.unique(alone.round(4), axis=0)) == 7


async def test_a_deadline_ends_all_of_it() -> None:
    async with served(ScriptedBackend(Gate())) as front:
        body = {"model": "m", "input": ["a"] * 100, "timeout_s": 0.3}
        answer = await front.http.post("/v1/embeddings", json=body)
        assert answer.status_code == 504 and not front.backend.live
        assert len(front.backend.requests) == len(front.backend.aborted) == MAX_AT_ONCE


async def test_one_way_is_for_all_inputs_and_nothing_is_generated() -> None:
    for pooling in Pooling:
        async with served(says([300]), pooling=pooling) as front:
            answer = await front.http.post("/v1/embeddings", json={"input": "Hi", "priority": 3, "cache_salt": "s"})
            assert answer.json()["data"][0]["embedding"] == list(embedding_of(tokens_of("Hi")))
            (request,) = front.backend.requests
            assert (request.sampling.pooling, request.sampling.max_tokens) == (pooling, 0)
            assert (request.priority, request.cache_salt) == (3, "s")


def test_ollama(one: Served, http: httpx.Client) -> None:
    whole = vectors(embed(http, TEXTS))
    answer = http.post("/api/embed", json={"model": "m:latest", "input": TEXTS, "keep_alive": "5m"}).json()
    assert np.allclose(answer["embeddings"], whole, atol=1e-6) and answer["model"] == "m:latest"
    assert answer["prompt_eval_count"] == sum(len(tokens_of(text)) for text in TEXTS)
    assert answer["total_duration"] > 0 and answer["load_duration"] == 0
    some = http.post("/api/embed", json={"model": "m", "input": TEXTS[0], "dimensions": 8}).json()["embeddings"]
    assert np.allclose(some, vectors(embed(http, TEXTS[0], dimensions=8)), atol=1e-6)
    old = http.post("/api/embeddings", json={"model": "m", "prompt": TEXTS[1]}).json()["embedding"]
    assert np.allclose(old, whole[1], atol=1e-6)
    for empty in ({}, {"input": ""}, {"input": []}):
        assert http.post("/api/embed", json={"model": "m", **empty}).json()["embeddings"] == []
    assert http.post("/api/embeddings", json={"model": "m"}).json() == {"embedding": []}


async def test_ollama_cuts_what_is_too_long() -> None:
    text = "word " * 20_000
    async with served(says([])) as front:
        cut = await front.http.post("/api/embed", json={"model": "m", "input": text})
        assert cut.json()["prompt_eval_count"] == 512
        assert front.backend.requests[0].token_ids == list(tokens_of(text)[:512])
        assert (await front.http.post("/api/embeddings", json={"model": "m", "prompt": text})).status_code == 200
        whole = await front.http.post("/api/embed", json={"model": "m", "input": text, "truncate": False})
        assert whole.status_code == 400 and "512 tokens" in whole.json()["error"]


def test_grpc(one: Served, http: httpx.Client) -> None:
    whole = vectors(embed(http, TEXTS))
    ids = [list(tokens_of(text)) for text in TEXTS]
    with grpc.insecure_channel(f"127.0.0.1:{one.front_end.grpc_port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        inputs = [
            inference_pb2.EmbedInput(text=TEXTS[0]),
            inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=ids[1])),
        ]
        answer = stub.Embed(inference_pb2.EmbedRequest(inputs=inputs), timeout=30)
        assert np.allclose([each.values for each in answer.embeddings], whole, atol=1e-6)
        assert (answer.model, answer.num_prompt_tokens) == ("m", sum(map(len, ids)))
        few = stub.Embed(inference_pb2.EmbedRequest(inputs=inputs[:1], dimensions=3), timeout=30)
        assert [len(each.values) for each in few.embeddings] == [3]
        for bad in ([], [inference_pb2.EmbedInput()], [inference_pb2.EmbedInput(text="")]):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Embed(inference_pb2.EmbedRequest(inputs=bad), timeout=30)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        vllm: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        tokenized = vllm_engine_pb2.TokenizedInput(input_ids=ids[1])
        single = vllm.Embed(vllm_engine_pb2.EmbedRequest(tokenized=tokenized), timeout=30)
        assert np.allclose(single.embedding, whole[1], atol=1e-6)
        assert (single.prompt_tokens, single.embedding_dim) == (len(ids[1]), HIDDEN_SIZE)
