"""Behind a real Envoy as it is shipped: streams, cancels, tokens, certificates, forged identities."""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.identity.principal import Principal, current_principal
from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from engine.request import FinishReason, Output, Request
from tests.frontend.bodies import completion
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import TINY
from tests.gateway.envoy import CLIENT, Edge, edge
from tests.identity.authority import Signer, forged_with_hmac

NUM_TOKENS = 8
SPOOFED = {
    "x-remuda-tenant": "team-x",
    "x-remuda-key": "mallory",
    "x-remuda-priority": "-9",
    "x-forwarded-client-cert": f"URI={CLIENT}",
    "x-api-key": "any",
}


class Paced:
    """Gives a token whenever it is told to: where something on the way buffers, the reader never sees it."""

    def __init__(self) -> None:
        self.tokens: asyncio.Semaphore = asyncio.Semaphore(0)
        self.principals: list[Principal] = []
        self.ended = asyncio.Event()

    async def script(self, request: Request) -> AsyncGenerator[Output, None]:
        self.principals.append(current_principal())
        try:
            for index in range(NUM_TOKENS):
                await self.tokens.acquire()
                reason = FinishReason.LENGTH if index == NUM_TOKENS - 1 else None
                yield Output(request.request_id, [300 + index], finish_reason=reason)
        finally:
            self.ended.set()

    def open(self) -> None:
        """All tokens of a request."""
        for _ in range(NUM_TOKENS):
            self.tokens.release()


@asynccontextmanager
async def behind(directory: Path) -> AsyncIterator[tuple[Edge, Paced]]:
    paced = Paced()
    async with edge(directory, paced.script) as at:
        yield at, paced


def token(at: Edge, **changes: Any) -> str:
    values = {"iss": "https://login.example.com", "aud": "remuda", "sub": "bob", "exp": int(time.time()) + 60}
    claims = {**values, "tenant": "team-a", **changes}
    return at.signer.token({name: value for name, value in claims.items() if value is not None})


def bearer(at: Edge, **changes: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {token(at, **changes)}"}


def http(at: Edge, stem: str | None = None, *, http2: bool = False) -> httpx.AsyncClient:
    port = at.tokens_port if stem is None else at.certificates_port
    url, context = f"https://127.0.0.1:{port}", at.context(stem)
    return httpx.AsyncClient(base_url=url, verify=context, http2=http2, trust_env=False, timeout=10)


def channel(at: Edge, stem: str | None = None) -> grpc.aio.Channel:
    pair: tuple[bytes | None, bytes | None] = (None, None)
    if stem is not None:
        pair = (at.directory / f"{stem}.key").read_bytes(), (at.directory / f"{stem}.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials((at.directory / "edge-ca.crt").read_bytes(), *pair)
    port = at.tokens_port if stem is None else at.certificates_port
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=[("grpc.use_local_subchannel_pool", 1)])


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_server_sent_events_come_one_by_one(version: str, tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, paced), http(at, http2=version == "HTTP/2") as client:
        body = completion(stream=True, max_tokens=NUM_TOKENS)
        # The head comes with the first event.
        paced.tokens.release()
        async with client.stream("POST", "/v1/completions", headers=bearer(at), json=body) as answer:
            assert answer.http_version == version and answer.status_code == 200
            lines = (line async for line in answer.aiter_lines() if line.startswith("data: "))
            for _ in range(NUM_TOKENS - 1):
                # This event must be here before the next one is made.
                assert '"text"' in await asyncio.wait_for(anext(lines), 5)
                paced.tokens.release()
            rest = [line async for line in lines]
        assert rest[-1] == "data: [DONE]"
    assert [(each.tenant, each.kind, each.priority) for each in paced.principals] == [("team-a", "gateway", None)]


async def test_grpc_messages_come_one_by_one(tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, paced), channel(at) as to:
        metadata = tuple(bearer(at).items())
        request = inference_pb2.GenerateRequest(text="Hi")
        call = inference_pb2_grpc.InferenceStub(to).Generate(request, metadata=metadata)
        num_tokens = 0
        paced.tokens.release()
        async with asyncio.timeout(10):
            async for response in call:
                if response.WhichOneof("event") == "delta" and response.delta.token_ids:
                    num_tokens += len(response.delta.token_ids)
                    paced.tokens.release()
        assert num_tokens == NUM_TOKENS
    assert [each.tenant for each in paced.principals] == ["team-a"]


async def test_a_cancel_arrives(tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, paced), channel(at) as to:
        async with http(at) as client:
            body = completion(stream=True, max_tokens=NUM_TOKENS)
            paced.tokens.release()
            async with client.stream("POST", "/v1/completions", headers=bearer(at), json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        break
        await asyncio.wait_for(paced.ended.wait(), 2)

        paced.ended.clear()
        metadata = tuple(bearer(at).items())
        call = inference_pb2_grpc.InferenceStub(to).Generate(
            inference_pb2.GenerateRequest(text="Hi"), metadata=metadata
        )
        paced.tokens.release()
        await anext(aiter(call))
        call.cancel()
        await asyncio.wait_for(paced.ended.wait(), 2)


async def test_tokens_are_checked_at_the_edge(tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, _), http(at) as client, channel(at) as to:
        stub = inference_pb2_grpc.InferenceStub(to)
        denied, unknown = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
        claims = {"iss": "https://login.example.com", "aud": "remuda", "sub": "b", "exp": 4e9, "tenant": "team-a"}
        bad = {
            "none": {},
            "forged": {"authorization": f"Bearer {Signer('one').token(claims)}"},
            "hmac": {"authorization": f"Bearer {forged_with_hmac(at.signer, claims)}"},
            "expired": bearer(at, exp=int(time.time()) - 3600),
            "audience": bearer(at, aud="other"),
            "no tenant": bearer(at, tenant=None),
            "odd tenant": bearer(at, tenant="a b"),
        }
        for name, headers in bad.items():
            answer = await client.get("/v1/models", headers={**SPOOFED, **headers})
            # Envoy has 403 for a right token of somebody else's.
            statuses = (403, denied) if name == "audience" else (401, unknown)
            assert answer.status_code == statuses[0], name
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=tuple({**SPOOFED, **headers}.items()))
            assert caught.value.code() == statuses[1], name
        assert (await client.get("/v1/models", headers=bearer(at))).status_code == 200
        assert (await client.get("/metrics", headers=bearer(at))).status_code == 403
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            status = admin_pb2_grpc.AdminStub(to).GetStatus
            await status(admin_pb2.GetStatusRequest(), metadata=tuple(bearer(at).items()))
        assert caught.value.code() == denied


async def test_an_identity_that_a_client_claims_is_dropped(tmp_path: Path) -> None:
    """With a token it is the token's, with a certificate the certificate's."""
    async with behind(tmp_path) as (at, paced):
        paced.open()
        paced.open()
        async with http(at) as by_token, http(at, "client") as by_certificate:
            body = completion(max_tokens=NUM_TOKENS)
            headers = {**SPOOFED, **bearer(at)}
            assert (await by_token.post("/v1/completions", headers=headers, json=body)).status_code == 200
            del headers["authorization"], headers["x-api-key"]
            answer = await by_certificate.post("/v1/completions", headers=headers, json=body)
            assert answer.status_code == 200
    found = [(each.tenant, each.kind, each.priority) for each in paced.principals]
    assert found == [("team-a", "gateway", None), ("team-c", "certificate", None)]
    assert [each.key_id for each in paced.principals] == ["gateway-key:bob", f"cert:uri:{CLIENT}"]


async def test_certificates_are_checked_at_the_edge_and_their_names_here(tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, _):
        expected = {"client": 200, "stranger": 401, "forger": None}
        for stem, status in expected.items():
            async with http(at, stem) as client, channel(at, stem) as to:
                try:
                    found: int | None = (await client.get("/v1/models", headers=SPOOFED)).status_code
                # With TLS 1.3 the refusal may come as late as an answer: as an alert that httpx passes on as it is.
                except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, ssl.SSLError):
                    found = None
                # What it calls itself beside its certificate has been taken away; a key that it shows has too.
                assert found == status, stem
                codes = {
                    200: grpc.StatusCode.OK,
                    401: grpc.StatusCode.UNAUTHENTICATED,
                    None: grpc.StatusCode.UNAVAILABLE,
                }
                call = inference_pb2_grpc.InferenceStub(to).ListModels(inference_pb2.ListModelsRequest(), timeout=10)
                assert await call.code() == codes[status], stem


async def test_remuda_tiny_says_the_same_behind_it(tmp_path: Path) -> None:
    backend = RealBackend(TINY)
    body = completion(prompt="The herd", max_tokens=24, temperature=0)
    try:
        async with edge(tmp_path, backend) as at, http(at) as client, channel(at) as to:
            straight = httpx.AsyncClient(verify=_with(at, "gateway"), trust_env=False)
            async with straight:
                url = f"https://127.0.0.1:{at.port}/v1/completions"
                said = (await straight.post(url, headers={"x-remuda-tenant": "t"}, json=body)).json()
            answer = await client.post("/v1/completions", headers=bearer(at), json=body)
            assert answer.json()["choices"] == said["choices"] and len(said["choices"][0]["text"]) > 10
            request = inference_pb2.GenerateRequest(text="The herd")
            request.sampling.max_tokens, request.sampling.temperature = 24, 0.0
            call = inference_pb2_grpc.InferenceStub(to).Generate(request, metadata=tuple(bearer(at).items()))
            assert "".join([each.delta.text async for each in call]) == said["choices"][0]["text"]
    finally:
        backend.close()


async def test_nobody_passes_the_gateway_by(tmp_path: Path) -> None:
    async with behind(tmp_path) as (at, _):
        url = f"https://127.0.0.1:{at.port}/v1/models"
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(url, headers={"x-remuda-tenant": "team-a"})
        async with httpx.AsyncClient(verify=_with(at, "gateway"), trust_env=False) as client:
            assert (await client.get(url, headers={"x-remuda-tenant": "team-a"})).status_code == 200


def _with(at: Edge, stem: str) -> Any:
    context = at.context(stem)
    context.load_verify_locations(at.directory / "remuda-ca.crt")
    context.check_hostname = False
    return context
