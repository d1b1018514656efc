"""Calls of Health.Watch, which everybody may make and which have no end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.rpc.aio_server import make_server
from cluster.rpc.health import MAX_WATCHES_A_CONNECTION, add_health_and_reflection

STEP_S = 30.0
ASKED = health_pb2.HealthCheckRequest(service="a")
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@contextlib.asynccontextmanager
async def serving(max_watches: int) -> AsyncIterator[str]:
    server = make_server()
    health = await add_health_and_reflection(server, ["a"], max_watches)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def connection(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])


async def watch(channel: grpc.aio.Channel) -> Any:
    """A call that goes on. Raises grpc.aio.AioRpcError."""
    call = health_pb2_grpc.HealthStub(channel).Watch(ASKED, timeout=STEP_S)
    async for answer in call:
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        return call
    raise AssertionError(await call.code())


async def refused(channel: grpc.aio.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch(channel)
    return caught.value.code()


async def test_one_connection_has_so_many() -> None:
    async with serving(1_000) as target, connection(target) as one, connection(target) as other:
        calls = [await watch(one) for _ in range(MAX_WATCHES_A_CONNECTION)]
        assert await refused(one) is EXHAUSTED
        await watch(other)
        assert (await health_pb2_grpc.HealthStub(one).Check(ASKED, timeout=STEP_S)).status
        assert not any(call.done() for call in calls)


async def test_all_have_so_many_and_a_place_becomes_free() -> None:
    async with serving(3) as target, connection(target) as one, connection(target) as other:
        first, *_ = [await watch(channel) for channel in (one, one, other)]
        assert await refused(one) is EXHAUSTED and await refused(other) is EXHAUSTED
        first.cancel()
        async with asyncio.timeout(STEP_S):
            while True:  # until the server has heard of it
                try:
                    await watch(other)
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is EXHAUSTED


async def test_a_name_that_is_kept_is_short() -> None:
    async with serving(1) as target, connection(target) as one:
        call = health_pb2_grpc.HealthStub(one).Watch(
            health_pb2.HealthCheckRequest(service="a" * 100_000), timeout=STEP_S
        )
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await watch(one)
