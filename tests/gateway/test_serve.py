"""``remuda serve`` itself, with its leader and ranks, behind a real Envoy as it is shipped."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.envoy import CLIENT, Edge, envoy_before, security_values, write_files
from tests.gateway.test_envoy import SPOOFED, bearer, channel, http
from tests.identity.authority import Signer
from tests.support.served import Served, free_port

MODEL = "remuda-tiny"
CANCEL_S = 2.0


class Secured(Served):
    """One that is asked for its health at a port of its own."""

    probes_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.probes_port}"


@asynccontextmanager
async def behind(directory: Path) -> AsyncIterator[Edge]:
    signer, probes_port = Signer("one"), free_port()
    write_files(directory, signer)
    values = security_values(directory)
    values["tls"]["health_port"] = probes_port
    (directory / "security.yaml").write_text(json.dumps(values))
    one = Secured((MODEL, "--tp", "2", "--security-file", str(directory / "security.yaml")), directory / "serve.log")
    one.probes_port = probes_port
    await asyncio.to_thread(one.__enter__)
    try:
        async with envoy_before(directory, one.port, one.grpc_port) as ports:
            yield Edge(one.port, one.grpc_port, directory, signer, *ports)
    finally:
        await asyncio.to_thread(one.__exit__, None, None, None)


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_serve_behind_envoy(tmp_path: Path) -> None:
    """One start for all: each part says what it holds."""
    async with behind(tmp_path) as at:
        await _who_may_not(at)
        await _whose_it_is(at)
        for number, cancelled in enumerate((_cancelled_over_http, _cancelled_over_grpc), start=1):
            await cancelled(at)
            assert await _idle_after(at, number) < CANCEL_S, cancelled.__name__


async def _who_may_not(at: Edge) -> None:
    """Without a token, with a forged one, without a certificate, past the gateway."""
    forged = bearer(Edge(at.port, at.grpc_port, at.directory, Signer("one"), at.tokens_port, at.certificates_port))
    async with http(at) as client, channel(at) as to:
        stub = inference_pb2_grpc.InferenceStub(to)
        for headers in ({}, SPOOFED, forged, bearer(at, exp=int(time.time()) - 3600)):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
            call = stub.ListModels(inference_pb2.ListModelsRequest(), metadata=tuple(headers.items()))
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert (await client.get("/v1/models", headers=bearer(at))).status_code == 200
        assert (await client.get("/metrics", headers=bearer(at))).status_code == 403
    context = at.context()
    for port in (at.certificates_port, at.port):
        async with httpx.AsyncClient(verify=context, trust_env=False) as stranger:
            with pytest.raises(httpx.HTTPError):
                await stranger.get(f"https://127.0.0.1:{port}/v1/models", headers=SPOOFED)


async def _whose_it_is(at: Edge) -> None:
    """Usage is the token's tenant's and the certificate's, whatever headers say."""
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 4}
    async with http(at) as by_token, http(at, "client") as by_certificate, _operator(at) as operator:
        assert (await by_token.post("/v1/completions", headers={**SPOOFED, **bearer(at)}, json=body)).status_code == 200
        headers = {name: value for name, value in SPOOFED.items() if name != "x-api-key"}
        assert (await by_certificate.post("/v1/completions", headers=headers, json=body)).status_code == 200
        totals = (await operator.get("/v1/usage")).json()["data"]
    keys = {(each["tenant"], each["key_id"]) for each in totals}
    assert keys == {("team-a", "gateway-key:bob"), ("team-c", f"cert:uri:{CLIENT}")}, totals


def _operator(at: Edge) -> httpx.AsyncClient:
    """Straight to the server: the gateway may not infer as anybody with other scopes."""
    context = at.context("operator")
    context.load_verify_locations(at.directory / "remuda-ca.crt")
    context.check_hostname = False
    return httpx.AsyncClient(base_url=f"https://127.0.0.1:{at.port}", verify=context, trust_env=False)


def _long() -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}


async def _cancelled_over_http(at: Edge) -> None:
    async with http(at) as client, client.stream("POST", "/v1/completions", headers=bearer(at), json=_long()) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                break


async def _cancelled_over_grpc(at: Edge) -> None:
    async with channel(at) as to:
        request = inference_pb2.GenerateRequest(text="Hi")
        request.sampling.max_tokens, request.sampling.ignore_eos = 2000, True
        call = inference_pb2_grpc.InferenceStub(to).Generate(request, metadata=tuple(bearer(at).items()))
        async for response in call:
            if response.WhichOneof("event") == "delta":
                break
        call.cancel()


async def _idle_after(at: Edge, num_cancelled: int) -> float:
    """Seconds until the engine computes for nobody, and so many requests have been cancelled, none having come to its
    end by itself."""
    began_s, label = time.perf_counter(), f'{{model_name="{MODEL}"}}'
    async with _operator(at) as operator:
        while True:
            text = (await operator.get("/metrics")).text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            cancelled = values.get(f'remuda_requests_total{{model_name="{MODEL}",outcome="cancelled"}}', "0")
            if not float(values[f"remuda_num_requests_running{label}"]) and float(cancelled) == num_cancelled:
                return time.perf_counter() - began_s
            assert time.perf_counter() - began_s < 10, f"the request runs on; {cancelled} were cancelled"
            await asyncio.sleep(0.02)
