"""A leader with a scripted engine, its gRPC server on 127.0.0.1, and a client of it."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import SERVICE_NAME, LeaderServer
from cluster.rpc.channel import open_channel
from cluster.types import ReplicaInfo, ReplicaState
from engine.request import Output, Request, SamplingParams
from tests.support.scripted_engine import ScriptedEngine

WAIT_S = 20.0
INFO = ReplicaInfo(
    id="replica-0",
    model="m",
    state=ReplicaState.STARTING,
    address="",
    incarnation=7,
    max_model_len=4096,
    max_num_seqs=64,
    block_size=16,
    num_blocks=100,
)


@dataclass
class Bed:
    engine: ScriptedEngine
    loop: EngineLoop
    server: LeaderServer
    address: str
    client: ReplicaClient


@asynccontextmanager
async def serving(
    engine: ScriptedEngine | None = None, bind: str = "127.0.0.1:0", grace_s: float = 30.0
) -> AsyncIterator[Bed]:
    engine = engine or ScriptedEngine()
    loop = EngineLoop(engine)
    server = LeaderServer(loop, INFO, bind, grace_s=grace_s)
    address = await server.start()
    client = ReplicaClient(address, "front-end-0", randomness=random.Random(0))
    try:
        await client.connect(WAIT_S)
        yield Bed(engine, loop, server, address, client)
    finally:
        engine.gate.set()
        await client.close()
        await server.stop(WAIT_S)


def request(name: str, max_tokens: int = 5, prompt: list[int] | None = None, seed: int = 0) -> Request:
    tokens = [1, 2, 3] if prompt is None else prompt
    return Request(name, tokens, len(tokens), SamplingParams(max_tokens=max_tokens, seed=seed))


async def collect(client: ReplicaClient, wanted: Request) -> list[Output]:
    return [output async for output in client.generate(wanted)]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what has no event of its own."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def health_of(bed: Bed) -> int:
    async with open_channel(bed.address) as channel:
        asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        return int((await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=WAIT_S)).status)
