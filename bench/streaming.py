"""The streaming path without a model: 64 streams from a mock engine through a leader to the front end's client.

Two loads. *Full speed*: the next step begins when the last one's tokens are on their way; the figure is tokens/s that
reach the readers. *Paced* at 20 ms a step, as a large model would: the figure is CPU per token, server and client
together. The reference, in turns with ours: a plain grpc.aio server with one message per token, read by plain calls.
"""

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from bench.measure import Row, row
from cluster.replica.client import ReplicaClient
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from engine.request import Request, SamplingParams

NUM_STREAMS = 64
PACED_STEP_S = 0.020


@dataclass(frozen=True)
class Figures:
    """One repetition. ``cpu_us_per_token``: server and client processes together."""

    tokens_per_s: float
    cpu_us_per_token: float
    tokens_per_output: float


@asynccontextmanager
async def server_process(kind: str, step_s: float) -> AsyncIterator[tuple[Process, str]]:
    command = [sys.executable, "-m", "bench.streaming_server", kind, "--step-s", str(step_s)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def timed(server_pid: int, streams: Callable[[int], Awaitable[int]], num_tokens: int) -> Figures:
    """Runs all streams at once. ``streams(i)`` reads stream i to its end and returns its number of outputs."""
    cpu_before_s = cpu_s(server_pid) + cpu_s(os.getpid())
    before_s = time.perf_counter()
    num_outputs = sum(await asyncio.gather(*(streams(index) for index in range(NUM_STREAMS))))
    elapsed_s = time.perf_counter() - before_s
    used_s = cpu_s(server_pid) + cpu_s(os.getpid()) - cpu_before_s
    total = NUM_STREAMS * num_tokens
    return Figures(total / elapsed_s, used_s / total * 1e6, total / num_outputs)


async def measure_leader(num_tokens: int, step_s: float) -> Figures:
    async with server_process("leader", step_s) as (process, address):
        client = ReplicaClient(address, "bench")
        await client.connect()

        async def read(index: int, length: int = num_tokens) -> int:
            request = Request(f"request-{index}", [1, 2, 3], 3, SamplingParams(max_tokens=length))
            num_outputs, received = 0, 0
            async for output in client.generate(request):
                num_outputs += 1
                received += len(output.token_ids)
            assert received == length, f"{received} tokens came of {length}"
            return num_outputs

        await asyncio.gather(*(read(index, 20) for index in range(NUM_STREAMS)))
        figures = await timed(process.pid, read, num_tokens)
        await client.close()
        return figures


async def measure_reference(num_tokens: int, step_s: float) -> Figures:
    async with server_process("reference", step_s) as (process, address), open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def read(index: int, length: int = num_tokens) -> int:
            sampling = common_pb2.SamplingParams(max_tokens=length)
            num_messages = 0
            async for _ in stub.Generate(inference_pb2.GenerateRequest(sampling=sampling)):
                num_messages += 1
            assert num_messages == length, f"{num_messages} messages came of {length}"
            return num_messages

        await asyncio.gather(*(read(index, 20) for index in range(NUM_STREAMS)))
        return await timed(process.pid, read, num_tokens)


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    ours: dict[str, list[Figures]] = {"full speed": [], "paced": []}
    reference: dict[str, list[Figures]] = {"full speed": [], "paced": []}
    for _ in range(num_repetitions):
        for load, step_s, num_ours, num_theirs in (
            ("full speed", 0.0, 200 if quick else 3000, 50 if quick else 300),
            ("paced", PACED_STEP_S, 20 if quick else 150, 20 if quick else 150),
        ):
            reference[load].append(asyncio.run(measure_reference(num_theirs, step_s)))
            ours[load].append(asyncio.run(measure_leader(num_ours, step_s)))
    merged = max(figures.tokens_per_output for figures in ours["full speed"])
    notes = f"÷ plain grpc.aio, one token a message; at most {merged:.1f} tokens an output"
    return [
        row(
            "streaming",
            f"{NUM_STREAMS} streams, leader to client, full speed",
            "tokens/s",
            [figures.tokens_per_s for figures in ours["full speed"]],
            [figures.tokens_per_s for figures in reference["full speed"]],
            "higher",
            notes,
        ),
        row(
            "streaming",
            f"{NUM_STREAMS} streams, leader to client, a step every {PACED_STEP_S * 1000:g} ms",
            "CPU µs/token",
            [figures.cpu_us_per_token for figures in ours["paced"]],
            [figures.cpu_us_per_token for figures in reference["paced"]],
            "lower",
            "÷ plain grpc.aio; server and client together",
        ),
    ]
