"""A gRPC call that is over is gone at once: where it waits for the garbage collector, thousands of bad ones pile up."""

import asyncio
import gc

import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2
from tests.frontend.scripted import says
from tests.frontend.servers import served
from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import call

GENERATE = b"/remuda.v1.Inference/Generate"
GOOD = inference_pb2.GenerateRequest(text="Hi").SerializeToString()
NUM_CALLS = 20


def num_contexts() -> int:
    """Of calls that this process has served and not given back."""
    return sum(type(each).__name__ == "_ServicerContext" for each in gc.get_objects())


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (GrpcInput("good", GENERATE, GOOD), 0),
        (GrpcInput("no model", GENERATE, inference_pb2.GenerateRequest(text="Hi", model="x").SerializeToString()), 5),
        (GrpcInput("no message", GENERATE, b"\xff"), 3),
        (GrpcInput("none", b"/vllm.grpc.engine.VllmEngine/SubscribeKvEvents", b""), 12),
        (GrpcInput("reflection", b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\0"), 0),
        (GrpcInput("bad reflection", b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\xff"), 3),
    ],
    ids=lambda value: value.kind if isinstance(value, GrpcInput) else "",
)
async def test_an_ended_call_is_gone(given: GrpcInput, status: int) -> None:
    async with served(says([300])) as one:
        gc.collect()
        gc.disable()
        try:
            before = num_contexts()
            for _ in range(NUM_CALLS):
                answer = await call("127.0.0.1", one.front_end.grpc_port, given)
                assert answer is not None and answer.status == status, answer
            async with asyncio.timeout(5):
                while num_contexts() > before:  # noqa: ASYNC110  the last one ends after its answer
                    await asyncio.sleep(0.02)
        finally:
            gc.enable()
