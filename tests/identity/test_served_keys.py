"""Keys, tokens and scopes at a running front end, over HTTP and gRPC."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.frontend.grpc_gate import GrpcGate
from cluster.identity.config import SecurityConfig
from cluster.identity.principal import Principal, current_principal
from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from engine.config import GrammarBackend
from engine.grammar import check_grammar
from engine.request import Grammar, Output, Request
from tests.frontend.bodies import chat, completion
from tests.frontend.scripted import Script, says
from tests.frontend.servers import Served, served
from tests.identity.authority import Signer

INFER, ADMIN, METRICS = "/v1/models", "/v1/unload_lora_adapter", "/metrics"
PROBES = ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready")
PROMISED_S = 5.0
"""Until a change of the files counts."""


def made_key(path: Path, *args: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["keys", "create", "--file", str(path), "--json", *args])
    return dict(json.loads(result.stdout))


def with_keys(path: Path) -> SecurityConfig:
    return SecurityConfig.model_validate({"api_keys": {"file": path}})


@asynccontextmanager
async def guarded(security: SecurityConfig, script: Script | None = None, **changes: Any) -> AsyncIterator[Served]:
    async with served(script or says([300]), security=security, **changes) as one:
        yield one


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def status_of(one: Served, path: str, key: str | None = None) -> int:
    headers = {} if key is None else bearer(key)
    if path == ADMIN:
        return (await one.http.post(path, headers=headers, json={"lora_name": "none"})).status_code
    return (await one.http.get(path, headers=headers)).status_code


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    return () if key is None else (("authorization", f"Bearer {key}"),)


async def rpc_codes(one: Served, key: str | None) -> tuple[grpc.StatusCode, grpc.StatusCode]:
    """Of an inference call and of an admin call."""
    infer, admin = inference_pb2_grpc.InferenceStub(one.channel), admin_pb2_grpc.AdminStub(one.channel)
    return (
        await code_of(infer.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata(key))),
        await code_of(admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=metadata(key))),
    )


async def test_scopes_are_apart_and_probes_are_open(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {scope: made_key(path, "--scope", scope)["key"] for scope in ("infer", "admin", "metrics")}
    ok, denied, unknown = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
    async with guarded(with_keys(path)) as one:
        for scope, allowed in (("infer", INFER), ("admin", ADMIN), ("metrics", METRICS)):
            for path_ in (INFER, ADMIN, METRICS):
                status = await status_of(one, path_, keys[scope])
                assert (status == 403) == (path_ != allowed), (scope, path_, status)
        answer = await one.http.get(METRICS, headers=bearer(keys["infer"]))
        assert answer.json()["error"] == {
            "message": "these credentials do not have the scope 'metrics'; use some that do",
            "type": "permission_error",
            "param": None,
            "code": "permission_denied",
        }
        assert await rpc_codes(one, keys["infer"]) == (ok, denied)
        assert await rpc_codes(one, keys["admin"]) == (denied, ok)
        for key in (None, "wrong"):
            assert [await status_of(one, each, key) for each in (INFER, ADMIN, METRICS, "/nowhere")] == [401] * 4
            assert await rpc_codes(one, key) == (unknown, unknown)
        assert [await status_of(one, each) for each in PROBES] == [200] * 5
        health = health_pb2_grpc.HealthStub(one.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1


async def test_an_admin_path_in_other_letters_is_still_one(tmp_path: Path) -> None:
    key = made_key(tmp_path / "keys")["key"]
    async with guarded(with_keys(tmp_path / "keys")) as one:
        for path in ("/v1/%75nload_lora_adapter", "//v1/unload_lora_adapter", "/v1/./unload_lora_adapter"):
            answer = await one.http.post(path, headers=bearer(key), json={"lora_name": "none"})
            assert answer.status_code in (403, 404) and "removed" not in answer.text


def noting(seen: list[Principal]) -> Script:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        seen.append(current_principal())
        async for output in says([300, 301])(request):
            yield output

    return script


async def test_what_runs_knows_whom_it_runs_for(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = {name: made_key(path, "--tenant", name) for name in ("team-a", "team-b")}
    seen: list[Principal] = []
    async with guarded(with_keys(path), noting(seen)) as one:
        infer = inference_pb2_grpc.InferenceStub(one.channel)

        async def ask(name: str) -> None:
            key = made[name]["key"]
            for body in (completion(), completion(stream=True)):
                assert (await one.http.post("/v1/completions", headers=bearer(key), json=body)).status_code == 200
            request = inference_pb2.GenerateRequest(text="Hi")
            assert [each async for each in infer.Generate(request, metadata=metadata(key))]

        await asyncio.gather(*(ask(name) for name in made for _ in range(3)))
    found = sorted((each.tenant, each.key_id, each.kind) for each in seen)
    assert found == sorted((name, made[name]["id"], "key") for name in made for _ in range(9))


async def until(condition: Callable[[], Any], within_s: float) -> float:
    """Seconds until ``condition`` came true."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within_s
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def test_revoked_and_new_keys_count_within_five_seconds(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old = made_key(path)
    async with guarded(with_keys(path)) as one:
        assert await status_of(one, INFER, old["key"]) == 200
        new = made_key(path)
        CliRunner().invoke(app, ["keys", "revoke", old["id"], "--file", str(path)])

        async def is_revoked() -> bool:
            codes = await rpc_codes(one, old["key"])
            return await status_of(one, INFER, old["key"]) == 401 and codes[0] == grpc.StatusCode.UNAUTHENTICATED

        assert await until(is_revoked, 20.0) < PROMISED_S
        assert await status_of(one, INFER, new["key"]) == 200


def with_keys_and_tokens(keys: Path, jwks: Path) -> SecurityConfig:
    return with_tokens(str(jwks)).model_copy(update={"api_keys": with_keys(keys).api_keys})


async def test_keys_are_revoked_while_clients_fill_every_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More of their work waits than any pool of this process has threads."""
    path, jwks, opened = tmp_path / "keys", tmp_path / "jwks.json", threading.Event()
    revoked, busy, first, second = made_key(path), made_key(path)["key"], Signer("one"), Signer("two", "ES256")
    jwks.write_text(json.dumps({"keys": [first.jwk]}))

    def held_check(grammar: Grammar, param: str, backend: GrammarBackend) -> None:
        assert opened.wait(60)
        check_grammar(grammar, param, backend)

    monkeypatch.setattr("cluster.frontend.encoding.check_grammar", held_check)
    body = chat(response_format={"type": "json_object"})
    async with guarded(with_keys_and_tokens(path, jwks)) as one, asyncio.TaskGroup() as group:
        assert await status_of(one, INFER, revoked["key"]) == await status_of(one, INFER, token(first)) == 200
        ask = partial(one.http.post, "/v1/chat/completions", headers=bearer(busy), json=body, timeout=60)
        asked = [group.create_task(ask()) for _ in range(48)]
        try:
            while one.front_end.service.admission.num_requests < len(asked):  # noqa: ASYNC110  other connections
                await asyncio.sleep(0.02)
            changed_s = time.monotonic()
            CliRunner().invoke(app, ["keys", "revoke", revoked["id"], "--file", str(path)])
            jwks.write_text(json.dumps({"keys": [second.jwk]}))

            async def is_revoked() -> bool:
                return await status_of(one, INFER, revoked["key"]) == 401

            async def is_rotated() -> bool:
                return await status_of(one, INFER, token(second)) == 200

            took_s = {}
            for name, has_come in (("revoked", is_revoked), ("rotated", is_rotated)):
                await until(has_come, 20.0)
                took_s[name] = time.monotonic() - changed_s
            with capsys.disabled():
                print(f"\n{', '.join(f'{name} after {seconds:.2f} s' for name, seconds in took_s.items())}")
            assert max(took_s.values()) < PROMISED_S, took_s
            assert await status_of(one, INFER, token(first)) == 401
            assert not any(task.done() for task in asked), "all of it was there meanwhile"
        finally:
            opened.set()
    assert {task.result().status_code for task in asked} == {200}


@contextmanager
def issuer(keys: list[dict[str, str]]) -> Iterator[str]:
    """A real HTTP server of this machine that publishes ``keys`` as they are at each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"keys": keys}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/keys"
        server.shutdown()
        thread.join()


def with_tokens(jwks: str) -> SecurityConfig:
    section = {"issuer": "https://i.test", "audience": "remuda", "jwks": jwks, "tenant_claim": "tenant"}
    return SecurityConfig.model_validate({"jwt": [section]})


def token(signer: Signer, **changes: Any) -> str:
    claims = {"iss": "https://i.test", "aud": "remuda", "sub": "bob", "exp": time.time() + 60, "tenant": "team-a"}
    return signer.token({**claims, **changes})


@pytest.mark.parametrize("kind", ["url", "file"])
async def test_tokens_and_the_rotation_of_their_keys(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.identity.jwks.URL_COOLDOWN_S", 0.5)
    first, second = Signer("one"), Signer("two", "ES256")
    published = [first.jwk]
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": published}))
    with issuer(published) as url:
        async with guarded(with_tokens(url if kind == "url" else str(path))) as one:
            assert await status_of(one, INFER, token(first)) == 200
            assert await status_of(one, INFER, token(first, exp=time.time() - 60)) == 401
            assert await status_of(one, METRICS, token(first)) == 403
            assert await status_of(one, INFER, token(first, tenant="a b")) == 403
            assert (await rpc_codes(one, token(first)))[0] == grpc.StatusCode.OK
            assert await status_of(one, INFER, token(second)) == 401
            published[:] = [second.jwk]
            path.write_text(json.dumps({"keys": published}))

            async def knows_the_new() -> bool:
                return await status_of(one, INFER, token(second)) == 200

            await until(knows_the_new, 5.0)
            assert await status_of(one, INFER, token(first)) == 401


async def test_an_issuer_that_is_down_is_no_fault_of_the_token() -> None:
    async with guarded(with_tokens("http://127.0.0.1:9/keys")) as one:
        answer = await one.http.get(INFER, headers=bearer(token(Signer("one", "ES256"))))
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert (await rpc_codes(one, token(Signer("one", "ES256"))))[0] == grpc.StatusCode.UNAVAILABLE


async def test_the_body_of_a_stranger_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha-of-the-herd\n")
    async with guarded(with_keys(tmp_path / "keys")) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert b" 401 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()

        # Nor is a message over gRPC: this one never comes.
        method = one.channel.stream_unary(f"/{_SERVICE}/ListModels")
        never = asyncio.Event()

        async def messages() -> AsyncGenerator[bytes, None]:
            await never.wait()
            yield b""

        call = method(messages())
        assert await asyncio.wait_for(call.code(), 5) == grpc.StatusCode.UNAUTHENTICATED


_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


async def test_secrets_and_forged_identities_stay_out_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("hunter2-hunter2-right\n")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="hpack")

    async def broken(request: Request) -> AsyncGenerator[Output, None]:
        raise ZeroDivisionError
        yield

    async with guarded(with_keys(tmp_path / "keys"), broken) as one:
        for key in ("hunter2-hunter2-right", "hunter2-hunter2-wrong"):
            for headers in (bearer(key), {"x-api-key": key}):
                answer = await one.http.post("/v1/completions", headers=headers, json=completion())
                assert "hunter2" not in answer.text and "Traceback" not in answer.text
            await rpc_codes(one, key)
    ours = [record for record in caplog.records if record.name.startswith("cluster")]
    assert any(record.exc_info for record in ours), "a defect is logged, with its trace"
    text = "\n".join(caplog.handler.format(record) for record in ours)
    assert "hunter2" not in text


async def test_headers_cannot_be_injected(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha-of-the-herd\n")
    async with guarded(with_keys(tmp_path / "keys")) as one:
        for value in ("a b", "x" * 129, "a\tb", "é"):
            answer = await one.http.get(INFER, headers={**bearer("alpha-of-the-herd"), "x-request-id": value.encode()})
            assert answer.headers["x-request-id"].isalnum() and len(answer.headers["x-request-id"]) == 32
        raw = (
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alpha-of-the-herd\r\n",
            b"x-request-id: a\rset-cookie: b\r\n\r\n",
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
        writer.write(b"".join(raw))
        writer.write_eof()
        assert b"set-cookie" not in (await asyncio.wait_for(reader.read(), 5)).lower().replace(b"x-request-id", b"")
        writer.close()
        for path in ("/v1/models/%0d%0aset-cookie:%20a", "/%0d%0a%0d%0a"):
            answer = await one.http.get(path, headers=bearer("alpha-of-the-herd"))
            assert answer.status_code == 404 and "set-cookie" not in answer.headers


async def test_two_lengths_are_none(tmp_path: Path) -> None:
    """What a proxy in front might read otherwise than we do."""
    async with guarded(SecurityConfig()) as one:
        for second in (b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
            writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n" + second + b"\r\n{}")
            writer.write_eof()
            assert b" 400 " in (await asyncio.wait_for(reader.read(), 5)).split(b"\r\n")[0]
            writer.close()


@pytest.mark.parametrize("unit", [b"[", b'{"a":', b'{"a":['])
@pytest.mark.parametrize("depth", [300, 15_000, 400_000])
async def test_deep_json_is_refused(unit: bytes, depth: int) -> None:
    async with guarded(SecurityConfig()) as one:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/generate"):
            answer = await one.http.post(path, content=b'{"prompt":' + unit * depth)
            assert answer.status_code == 400, (path, answer.text[:200])
            assert answer.elapsed.total_seconds() < 5


async def test_oversized_bodies_and_messages() -> None:
    async with guarded(SecurityConfig()) as one:
        answer = await one.http.post("/v1/completions", content=b" " * (17 << 20))
        assert answer.status_code == 413
        infer = inference_pb2_grpc.InferenceStub(one.channel)
        request = inference_pb2.TokenizeRequest(text=" " * (65 << 20))
        assert await code_of(infer.Tokenize(request)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        large = (("x-large", "x" * (64 << 10)),)
        code = await code_of(infer.ListModels(inference_pb2.ListModelsRequest(), metadata=large))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await rpc_codes(one, None) == (grpc.StatusCode.OK, grpc.StatusCode.OK)


async def test_a_grpc_message_that_never_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = GrpcGate.__init__.__defaults__
    monkeypatch.setattr(GrpcGate.__init__, "__defaults__", (0.2, *(defaults or ())[1:]))
    async with guarded(SecurityConfig()) as one:
        call = one.channel.stream_unary(f"/{_SERVICE}/ListModels")()
        assert await asyncio.wait_for(call.code(), 5) == grpc.StatusCode.DEADLINE_EXCEEDED
        empty = one.channel.stream_unary(f"/{_SERVICE}/ListModels")()
        await empty.done_writing()
        assert await asyncio.wait_for(empty.code(), 5) == grpc.StatusCode.INVALID_ARGUMENT
