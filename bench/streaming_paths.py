"""The ways from an engine to a reader that bench/streaming.py compares, each with server processes of its own."""

import asyncio
import bisect
import json
import math
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.replica.client import ReplicaClient
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.request import Request, SamplingParams

PROMPT = [300, 301, 302]
Floats = NDArray[np.float64]


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    """Of a server-sent event no more than its tokens: a reader that parses it all holds up the streams."""

    choices: list[_Choice] = []


_chunks = msgspec.json.Decoder(_Chunk)


@dataclass
class Received:
    """One stream's messages: when each came, and how many tokens had come with it."""

    times_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def note(self, num_tokens: int) -> None:
        """A message with so many more tokens is here."""
        self.times_s.append(time.perf_counter())
        self.num_tokens.append(num_tokens + (self.num_tokens[-1] if self.num_tokens else 0))

    @property
    def total(self) -> int:
        return self.num_tokens[-1] if self.num_tokens else 0

    def num_at(self, at_s: float) -> int:
        """Tokens that had come by then."""
        num_messages = bisect.bisect_right(self.times_s, at_s)
        return self.num_tokens[num_messages - 1] if num_messages else 0

    def delays_s(self, step_s: float, since_s: float = -math.inf, until_s: float = math.inf) -> Floats:
        """Of each token that came between these times, how much later than the stream's quickest it came after its
        step, where steps are ``step_s`` apart. A message that holds many tokens is as many delays, of which the oldest
        token has the longest."""
        counts = np.diff(np.array([0, *self.num_tokens]))
        arrived_s = np.repeat(np.array(self.times_s), counts)
        late_s = arrived_s - step_s * np.arange(len(arrived_s))
        chosen: Floats = late_s[(arrived_s >= since_s) & (arrived_s <= until_s)] - late_s.min()
        return chosen


Read = Callable[[int, int], Awaitable[Received]]
"""(stream, tokens) → the messages in which that many tokens came."""


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

        async def read(index: int, num_tokens: int) -> Received:
            sampling = common_pb2.SamplingParams(max_tokens=num_tokens)
            received = Received()
            async for _ in stub.Generate(inference_pb2.GenerateRequest(sampling=sampling)):
                received.note(1)
            _check(received.total, num_tokens)
            return received

        yield StreamingPath((pid,), read)


@asynccontextmanager
async def leader_to_client(step_s: float) -> AsyncIterator[StreamingPath]:
    """The leader's packed frames, read through the front end's ReplicaClient."""
    async with server("leader", "--step-s", str(step_s)) as (pid, address):
        client = ReplicaClient(address, "bench")
        await client.connect()

        async def read(index: int, num_tokens: int) -> Received:
            request = Request(f"request-{index}", PROMPT, len(PROMPT), SamplingParams(max_tokens=num_tokens))
            received = Received()
            async for output in client.generate(request):
                received.note(len(output.token_ids))
            _check(received.total, num_tokens)
            return received

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

        async def read(index: int, num_tokens: int) -> Received:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=PROMPT),
                sampling=common_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
            )
            received = Received()
            async for response in stub.Generate(request):
                if response.delta.token_ids:
                    received.note(len(response.delta.token_ids))
            _check(received.total, num_tokens)
            return received

        yield StreamingPath(pids, read)


@asynccontextmanager
async def front_end_http(step_s: float) -> AsyncIterator[StreamingPath]:
    """All of it, with Server-Sent Events to the client."""
    async with (
        front_end(step_s) as (pids, address, _),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):

        async def read(index: int, num_tokens: int) -> Received:
            body = {"model": "mock", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            # Only where steps are due at their times, so that the delay of each token is known.
            body["return_token_ids"] = step_s > 0
            received, last = Received(), b""
            async with session.post(f"http://{address}/v1/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        last = line
                        count = _num_tokens(line) if step_s > 0 else 1
                        if count:
                            received.note(count)
            _check(json.loads(last[6:])["usage"]["completion_tokens"], num_tokens)
            return received

        yield StreamingPath(pids, read)


def _num_tokens(line: bytes) -> int:
    return sum(len(choice.token_ids or ()) for choice in _chunks.decode(line[6:]).choices)


def _check(received: int, wanted: int) -> None:
    if received != wanted:
        raise RuntimeError(f"{received} tokens came where {wanted} were asked for")
