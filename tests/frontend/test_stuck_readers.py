"""Clients that ask and then do not read: their requests end in time all the same."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
import pytest

from cluster.errors import DeadlineExceeded, Draining
from cluster.frontend import live_request
from cluster.frontend.calls import Delta, Finished, Started, TimeLimits, Usage
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.request import Output, Request, TopLogprobs
from tests.frontend.scripted import Gate
from tests.frontend.servers import Served, served
from tests.frontend.service_bed import Build, call

TIME_LIMIT_S = 0.8


async def endless(request: Request) -> AsyncGenerator[Output, None]:
    """More than sockets hold, soon."""
    entry = TopLogprobs(-0.5, 1, list(range(300, 320)), [-0.5] * 20)
    while True:
        yield Output(request.request_id, [300] * 100, logprobs=[entry] * 100)
        await asyncio.sleep(0.001)


async def test_work_stops_at_the_deadline_though_nobody_reads(build: Build) -> None:
    service, backend, clock = build(Gate(before=[300]))
    async with aclosing(service.generate(call(n=3, limits=TimeLimits(total_s=5)))) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
        assert len(backend.live) == 3
        clock.advance(6)
        await asyncio.wait_for(backend.until(lambda: not backend.live), 5)
        with pytest.raises(DeadlineExceeded):
            async for _ in events:
                pass
    assert clock.num_armed == 0


async def test_an_error_after_the_last_choices_end_is_none(build: Build) -> None:
    """A request ends once: here with its usage, though the server began to stop before the reader saw the end."""
    gate = Gate(before=[300], after=[301])
    service, backend, _ = build(gate)
    kinds = []
    async for event in service.generate(call()):
        kinds.append(type(event))
        if kinds == [Started, Delta]:
            gate.opened.set()
            await backend.until(lambda: not backend.live)
            service.end_all(Draining("the server stops"))
    assert kinds == [Started, Delta, Delta, Finished, Usage]


async def wait_until_over(one: Served) -> None:
    await asyncio.wait_for(one.backend.until(lambda: bool(one.backend.requests)), 5)
    await asyncio.wait_for(one.backend.until(lambda: not one.backend.live), TIME_LIMIT_S + 2)
    await asyncio.wait_for(one.front_end.service.admission.wait_idle(), 3)


async def test_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_request, "READER_GRACE_S", 0.2)
    async with served(endless) as one:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", one.front_end.port))
            body = json.dumps({"prompt": "Hi", "stream": True, "timeout_s": TIME_LIMIT_S, "n": 4, "logprobs": 20})
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(client, (head + body).encode())
            await wait_until_over(one)


async def test_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_request, "READER_GRACE_S", 0.2)
    limits = TimeLimits(total_s=TIME_LIMIT_S)
    async with served(endless, limits=limits) as one:
        request = inference_pb2.GenerateRequest(text="Hi", n=4, sampling=common_pb2.SamplingParams(logprobs=20))
        stream = inference_pb2_grpc.InferenceStub(one.channel).Generate(request)
        assert (await stream.read()).HasField("started")
        await wait_until_over(one)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await stream.read() is not grpc.aio.EOF:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
