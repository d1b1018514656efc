"""How much later a token is at a client behind Envoy than at one without: worst and median of a stream of tokens."""

import asyncio
import math
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from engine.request import FinishReason, Output, Request
from tests.frontend.bodies import completion
from tests.gateway.envoy import Edge, edge
from tests.gateway.test_envoy import bearer, channel, http

NUM_TOKENS, INTERVAL_S = 150, 0.01
MOST_ADDED_S = 0.020
Lags = list[float]


class Clocked:
    """A token every 10 ms; remembers when it gave each."""

    def __init__(self) -> None:
        self.given_s: list[float] = []

    async def script(self, request: Request) -> AsyncGenerator[Output, None]:
        self.given_s.clear()
        for index in range(NUM_TOKENS):
            await asyncio.sleep(INTERVAL_S)
            self.given_s.append(time.perf_counter())
            reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
            yield Output(request.request_id, [300 + index % 50], finish_reason=reason)


async def sse(client: httpx.AsyncClient, headers: dict[str, str]) -> AsyncIterator[None]:
    body = completion(stream=True, max_tokens=NUM_TOKENS, return_token_ids=True)
    async with client.stream("POST", "/v1/completions", headers=headers, json=body, timeout=20) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"token_ids":[' in line:
                yield


async def rpc(to: grpc.aio.Channel, headers: dict[str, str]) -> AsyncIterator[None]:
    request = inference_pb2.GenerateRequest(text="Hi")
    request.sampling.max_tokens = NUM_TOKENS
    call = inference_pb2_grpc.InferenceStub(to).Generate(request, metadata=tuple(headers.items()))
    async for response in call:
        if response.WhichOneof("event") == "delta" and response.delta.token_ids:
            yield


async def lags(stream: AsyncIterator[None], clocked: Clocked) -> Lags:
    """Of each token, seconds."""
    came_s = [time.perf_counter() async for _ in stream]
    assert len(came_s) == NUM_TOKENS, "one message a token, or the figures mean nothing"
    return [came - given for came, given in zip(came_s, clocked.given_s, strict=True)]


def channel_of(at: Edge) -> grpc.aio.Channel:
    """Straight to the front end, as the gateway itself."""
    read = [(at.directory / name).read_bytes() for name in ("remuda-ca.crt", "gateway.key", "gateway.crt")]
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "remuda")]
    address = f"127.0.0.1:{at.grpc_port}"
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(*read), options=options)


def client_of(at: Edge) -> httpx.AsyncClient:
    context = at.context("gateway")
    context.load_verify_locations(at.directory / "remuda-ca.crt")
    context.check_hostname = False
    return httpx.AsyncClient(base_url=f"https://127.0.0.1:{at.port}", verify=context, trust_env=False)


@pytest.mark.full
async def test_added_lag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best of three of each: the bound is of the gateway, not of what else this machine does."""
    clocked = Clocked()
    tenant = {"x-remuda-tenant": "team-a"}
    async with (
        edge(tmp_path, clocked.script) as at,
        http(at) as edge_http,
        client_of(at) as own_http,
        channel(at) as edge_rpc,
        channel_of(at) as own_rpc,
    ):
        pairs: dict[str, tuple[Callable[[], AsyncIterator[None]], Callable[[], AsyncIterator[None]]]] = {
            "SSE": (lambda: sse(own_http, tenant), lambda: sse(edge_http, bearer(at))),
            "gRPC": (lambda: rpc(own_rpc, tenant), lambda: rpc(edge_rpc, bearer(at))),
        }
        for name, (straight, behind) in pairs.items():
            worst_added_s = await _best(name, lambda make: lags(make(), clocked), straight, behind, capsys)
            assert worst_added_s <= MOST_ADDED_S


async def _best(
    name: str,
    measured: Callable[[Callable[[], AsyncIterator[None]]], Awaitable[Lags]],
    straight: Callable[[], AsyncIterator[None]],
    behind: Callable[[], AsyncIterator[None]],
    capsys: pytest.CaptureFixture[str],
) -> float:
    """Seconds that Envoy adds to the worst token, each way in the best of its three runs."""
    worst_own_s, worst_edge_s = math.inf, math.inf
    for _ in range(3):
        own, edges = await measured(straight), await measured(behind)
        worst_own_s, worst_edge_s = min(worst_own_s, max(own)), min(worst_edge_s, max(edges))
        added_ms = (statistics.median(edges) - statistics.median(own)) * 1e3
        with capsys.disabled():
            print(
                f"\n{name}: straight {statistics.median(own) * 1e3:.2f} (worst {max(own) * 1e3:.2f}) ms, behind Envoy "
                f"{statistics.median(edges) * 1e3:.2f} (worst {max(edges) * 1e3:.2f}) ms, added {added_ms:.2f} ms"
            )
    return worst_edge_s - worst_own_s
