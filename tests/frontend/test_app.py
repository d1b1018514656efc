"""The front end as a whole: what it refuses to start with, and how it stops."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.identity.config import load_security
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from cluster.tenants.tenancy import Tenancy
from engine.errors import InvalidOption
from engine.request import Output, Request
from tests.frontend.scripted import Gate, ScriptedBackend, replica_info, says
from tests.frontend.servers import TINY, served

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def config(**changes: Any) -> FrontEndConfig:
    return replace(FrontEndConfig("m", TINY, port=0, grpc_port=0), **changes)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])
async def test_an_open_address_needs_keys(host: str) -> None:
    with pytest.raises(InvalidOption, match="--api-key-file"):
        FrontEnd(config(host=host), ScriptedBackend(says([300])))


async def test_an_open_address_with_keys_serves(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha-of-the-herd\n")
    async with served(says([300]), key="alpha-of-the-herd", host="0.0.0.0", api_key_file=tmp_path / "keys") as one:
        assert (await one.http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("content", [None, "", "# none\n\n"])
async def test_a_key_file_must_hold_keys(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    security = load_security(None, tmp_path / "keys")
    with pytest.raises(InvalidOption, match="keys"):
        FrontEnd(config(security=security), ScriptedBackend(says([300])))


async def test_taken_ports_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidOption, match=f"--port {port}: cannot listen at 127.0.0.1"):
            FrontEnd(config(port=port), ScriptedBackend(says([300])))
        with pytest.raises(InvalidOption, match=f"--grpc-port {port}: cannot listen at 127.0.0.1"):
            FrontEnd(config(grpc_port=port), ScriptedBackend(says([300])))


async def test_probes() -> None:
    async with served(says([300])) as one:
        for path in ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"):
            response = await one.http.get(path)
            assert response.status_code == 200, path
            assert response.json()["status"] in ("live", "ready")
        one.backend.infos = [replica_info(num_running=1)]
        one.front_end.health._stall_s = -1
        for path in ("/livez", "/v2/health/live"):
            response = await one.http.get(path)
            assert response.status_code == 503
            assert response.json() == {"status": "stalled", "replicas": {"r0": "stalled"}}
        one.backend.infos = []
        for path in ("/readyz", "/health", "/v2/health/ready"):
            assert (await one.http.get(path)).status_code == 503


async def test_stopping_finishes_streams_and_takes_no_new_ones() -> None:
    gate = Gate(before=[300], after=[301])
    backend = ScriptedBackend(gate)
    async with served(backend) as one:
        running = asyncio.create_task(one.http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        await backend.until(lambda: bool(backend.live))
        stopping = asyncio.create_task(one.front_end.stop(30))
        while (await one.http.get("/readyz")).status_code == 200:
            pass
        refused = await one.http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        gate.opened.set()
        assert (await running).text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(stopping, 10)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", one.front_end.port)


async def test_streams_that_outlast_the_grace_are_told_so() -> None:
    async with served(Gate(before=[300])) as one:
        http = asyncio.create_task(one.http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        messages = [inference_pb2.ChatMessage(role="user", content="Hi")]
        request = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=messages))

        async def read() -> None:
            async for _ in inference_pb2_grpc.InferenceStub(one.channel).Generate(request):
                pass

        rpc = asyncio.create_task(read())
        await one.backend.until(lambda: len(one.backend.live) == 2)
        await one.front_end.stop(0.1)
        assert '"code":"draining"' in (await http).text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert one.backend.live == set()


async def test_watching_goes_on_after_a_defect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else leases would run out, and nothing would be counted, until somebody starts it anew."""
    poll, num_looks, again = Tenancy.poll, 0, asyncio.Event()

    async def breaks_once(tenancy: Tenancy) -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise ZeroDivisionError
        await poll(tenancy)
        again.set()

    monkeypatch.setattr(Tenancy, "poll", breaks_once)
    monkeypatch.setattr("cluster.frontend.app._WATCH_INTERVAL_S", 0.01)
    async with served(says([300])), asyncio.timeout(60):
        await again.wait()
    assert "limits and usage cannot be looked at; trying again" in caplog.text


async def test_nothing_is_left_after_stop() -> None:
    before = asyncio.all_tasks()
    async with served(Gate(before=[300])) as one:
        await asyncio.wait({asyncio.create_task(one.http.get("/livez"))})
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    for _ in range(100):
        left = {task for task in left if not task.done()}
        if not left:
            break
        await asyncio.sleep(0.01)
    assert left == set()


async def test_a_slow_reader_gets_everything(tiny: Any) -> None:
    """Tokens that come faster than the client reads are joined, not lost."""
    ids = [300 + index % 700 for index in range(400)]

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        async for output in says(ids)(request):
            yield output

    async with served(script) as one:
        body = {"prompt": "Hi", "max_tokens": 400, "stream": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port, limit=1000)
        text = str(body).replace("'", '"').replace("True", "true").encode()
        start = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head = f"{start}content-length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)
        await asyncio.sleep(0.3)
        received = (await reader.read(-1)).decode()
        assert "data: [DONE]" in received
        writer.close()
