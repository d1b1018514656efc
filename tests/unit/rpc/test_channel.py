"""Connections to hosts that are slow to answer."""

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.rpc.channel import open_channel
from cluster.rpc.health import add_health_and_reflection

DELAY_S = 1.0


async def test_a_handshake_may_take_a_while() -> None:
    """A busy host answers late; one call that does not wait for the connection is answered all the same."""
    server = grpc.aio.server()
    health = await add_health_and_reflection(server, ["a"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set_serving(True)
    num_connections, served = 0, asyncio.Event()

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
        target.close()
        await target.wait_closed()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await asyncio.sleep(DELAY_S)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, far_writer), forward(far_reader, writer))
        served.set()

    slow = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        async with open_channel(f"127.0.0.1:{slow.sockets[0].getsockname()[1]}") as channel:
            asked = health_pb2.HealthCheckRequest(service="a")
            found = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20)
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.wait_for(served.wait(), 10)
        assert num_connections == 1
    finally:
        slow.close()
        await server.stop(None)
