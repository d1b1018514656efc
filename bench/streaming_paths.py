"""The ways from an engine to a reader that bench/streaming.py compares, each with server processes of its own."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import aiohttp

from cluster.replica.client import ReplicaClient
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.request import Request, SamplingParams

PROMPT = [300, 301, 302]

Read = Callable[[int, int], Awaitable[int]]
"""(stream, tokens) → the number of messages in which that many tokens came."""


@dataclass(frozen=True)
class StreamingPath:
    """``pids``: the server processes. ``read`` runs one request to its end and checks that nothing was lost."""

    pids: tuple[int, ...]
    read: Read


MakePath = Callable[[float], AbstractAsyncContextManager[StreamingPath]]
"""Takes the seconds of a step; 0 for full speed."""


@asynccontextmanager
async def server(*arguments: str) -> AsyncIterator[tuple[int, str]]:
    """A bench.streaming_server process: its pid and the line that it printed."""
    command = [sys.executable, "-m", "bench.streaming_server", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode().strip()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended before it listened")
        yield process.pid, line
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def plain_grpc(step_s: float) -> AsyncIterator[StreamingPath]:
    """The reference: one message per token from a server that does nothing else."""
    async with server("reference", "--step-s", str(step_s)) as (pid, address), open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def read(index: int, num_tokens: int) -> int:
            sampling = common_pb2.SamplingParams(max_tokens=num_tokens)
            num_messages = 0
            async for _ in stub.Generate(inference_pb2.GenerateRequest(sampling=sampling)):
                num_messages += 1
            _check(num_messages, num_tokens)
            return num_messages

        yield StreamingPath((pid,), read)


@asynccontextmanager
async def leader_to_client(step_s: float) -> AsyncIterator[StreamingPath]:
    """The leader's packed frames, read through the front end's ReplicaClient."""
    async with server("leader", "--step-s", str(step_s)) as (pid, address):
        client = ReplicaClient(address, "bench")
        await client.connect()

        async def read(index: int, num_tokens: int) -> int:
            request = Request(f"request-{index}", PROMPT, len(PROMPT), SamplingParams(max_tokens=num_tokens))
            num_outputs, received = 0, 0
            async for output in client.generate(request):
                num_outputs += 1
                received += len(output.token_ids)
            _check(received, num_tokens)
            return num_outputs

        yield StreamingPath((pid,), read)
        await client.close()


@asynccontextmanager
async def front_end(step_s: float) -> AsyncIterator[tuple[tuple[int, int], str, str]]:
    """A leader and a front end: their pids, and the addresses of HTTP and gRPC."""
    async with (
        server("leader", "--step-s", str(step_s)) as (leader_pid, leader),
        server("front-end", "--leader", leader) as (pid, addresses),
    ):
        http, grpc_address = addresses.split()
        yield (leader_pid, pid), http, grpc_address


@asynccontextmanager
async def front_end_grpc(step_s: float) -> AsyncIterator[StreamingPath]:
    """All of it: leader, front end (detokenizer and all), remuda.v1 to the client."""
    async with front_end(step_s) as (pids, _, address), open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def read(index: int, num_tokens: int) -> int:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=PROMPT),
                sampling=common_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
            )
            num_messages, received = 0, 0
            async for response in stub.Generate(request):
                num_messages += 1
                received += len(response.delta.token_ids)
            _check(received, num_tokens)
            return num_messages

        yield StreamingPath(pids, read)


@asynccontextmanager
async def front_end_http(step_s: float) -> AsyncIterator[StreamingPath]:
    """All of it, with Server-Sent Events to the client."""
    async with (
        front_end(step_s) as (pids, address, _),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):

        async def read(index: int, num_tokens: int) -> int:
            body = {"model": "mock", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            num_events, last = 0, b""
            async with session.post(f"http://{address}/v1/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        num_events, last = num_events + 1, line
            _check(json.loads(last[6:])["usage"]["completion_tokens"], num_tokens)
            return num_events

        yield StreamingPath(pids, read)


def _check(received: int, wanted: int) -> None:
    if received != wanted:
        raise RuntimeError(f"{received} tokens came where {wanted} were asked for")
