"""A server of ours takes calls after calls that gRPC's own loop does not survive."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.rpc.aio_server import make_server
from cluster.rpc.health import add_health_and_reflection
from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import call

UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED.value[0]


@pytest.mark.parametrize("path", [b"/\xff/\xff", b"/grpc.health.v1.Health/\xc3", b"\xed\xa0\x80", b"/a/b", b"/", b""])
async def test_a_method_that_is_none(path: bytes) -> None:
    server = make_server()
    health = await add_health_and_reflection(server, ["a"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        await health.set_serving(True)
        for _ in range(3):
            answer = await call("127.0.0.1", port, GrpcInput("headers", path, b""))
            assert answer is not None
            # The library itself closes a stream whose path is empty.
            assert answer.status == UNIMPLEMENTED or (not path and answer.is_cut), answer
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                asked = health_pb2.HealthCheckRequest(service="a")
                found = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        assert not server._server._refusing  # type: ignore[attr-defined]
    finally:
        await asyncio.wait_for(server.stop(None), 5)
