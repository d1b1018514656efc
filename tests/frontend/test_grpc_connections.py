"""What strangers hold open at the gRPC port costs neither the process's files nor the HTTP port."""

import asyncio
import contextlib
import resource
from collections.abc import AsyncGenerator, Iterator

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.frontend.app import FrontEndConfig
from cluster.frontend.grpc_limits import GrpcLimits
from cluster.frontend.http_protocol import HttpLimits
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from engine.request import FinishReason, Output, Request
from tests.frontend.scripted import says
from tests.frontend.servers import TINY, Served, served

STEP_S = 30.0
NUM_STRANGERS, MOST = 400, 50
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With it a connection is one of HTTP/2; it needs no call."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def stranger(one: Served) -> Connection:
    reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.grpc_port)
    writer.write(PREFACE)
    return reader, writer


async def is_taken(connection: Connection) -> bool:
    """Whether the server speaks on it, or has closed it."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(STEP_S):
            return bool(await connection[0].read(1))
    return False


async def last_words(connection: Connection) -> bytes:
    """What came before the server ended it. Raises TimeoutError."""
    reader, writer = connection
    try:
        async with asyncio.timeout(STEP_S):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def check(channel: grpc.aio.Channel) -> bool:
    asked = health_pb2.HealthCheckRequest()
    found = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=STEP_S, wait_for_ready=True)
    return found.status == health_pb2.HealthCheckResponse.SERVING


async def test_many_idle_connections() -> None:
    async with served(says([300]), grpc_limits=GrpcLimits(max_connections=MOST)) as one:
        process = psutil.Process()
        num_before = process.num_fds()
        strangers = [await stranger(one) for _ in range(NUM_STRANGERS)]
        try:
            taken = await asyncio.gather(*(is_taken(connection) for connection in strangers))
            # A place is free again once what had it is gone, so no fewer; and never more.
            assert sum(taken) == MOST
            assert process.num_fds() - num_before - NUM_STRANGERS <= MOST + 20
            assert (await one.http.get("/livez")).status_code == 200
        finally:
            for _, writer in strangers:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
        assert await check(one.channel)


async def test_idle_connections_end_and_streams_do_not() -> None:
    is_ended = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [300])
        await is_ended.wait()
        yield Output(request.request_id, [301], finish_reason=FinishReason.LENGTH)

    async with served(script, grpc_limits=GrpcLimits(idle_s=1.0)) as one:
        asked = inference_pb2.GenerateRequest(text="Hi")
        asked.sampling.max_tokens = 2
        async with grpc.aio.insecure_channel(f"127.0.0.1:{one.front_end.grpc_port}") as other:
            call = inference_pb2_grpc.InferenceStub(other).Generate(asked, timeout=2 * STEP_S)
            async with asyncio.timeout(STEP_S):
                async for event in call:
                    if event.delta.token_ids:
                        break
            assert await check(one.channel)
            # The one that never called, and later than it the one that called: both are idle longer than the stream is.
            first, second = await stranger(one), await stranger(one)
            said = await asyncio.gather(last_words(first), last_words(second))
            # Not that they do not answer pings, for which they would be ended later.
            assert all(words.endswith(b"connection idle") for words in said), said
            is_ended.set()
            rest = [event async for event in call]
            assert [token for event in rest for token in event.delta.token_ids] == [301]
        # Its connection has ended meanwhile: it makes another.
        assert await check(one.channel)


@contextlib.contextmanager
def file_limit(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_each_server_has_a_share_of_the_files() -> None:
    with file_limit(1024):
        config = FrontEndConfig("m", TINY)
        assert (config.http_limits.max_connections, config.grpc_limits.max_connections) == (512, 256)
        assert HttpLimits().max_connections == 512
    assert ("grpc.max_allowed_incoming_connections", 7) in GrpcLimits(max_connections=7).options()
