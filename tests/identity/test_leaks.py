"""What a client is told of faults that are ours."""

import logging
from collections.abc import AsyncGenerator

import grpc
import pytest

from cluster.errors import UnknownStream
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from cluster.rpc.status import fields_of
from engine.errors import EngineFailure, RankFailure, RemudaError
from engine.request import Output, Request
from tests.frontend.bodies import completion
from tests.frontend.scripted import says
from tests.frontend.servers import served
from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.grpc_wire import call

TRACE = (
    "the engine raised OSError: [Errno 28] No space left on device: '/var/lib/remuda/x.bin'\n"
    'Traceback (most recent call last):\n  File "/opt/app/engine/engine.py", line 3, in step'
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineFailure(TRACE), "the engine raised OSError: [Errno 28] No space left on device: '(a file)'"),
        (RankFailure("rank 1 ended: see /tmp/a/b.log", 1), "rank 1 ended: see (a file)"),
        (EngineFailure("a/b and 1/2 and http://h/x/y are no paths"), "a/b and 1/2 and http://h/x/y are no paths"),
        (EngineFailure("/etc/passwd"), "(a file)"),
        (EngineFailure("(/a/b), [/c/d/] path=/e/f;"), "((a file)), [(a file)] path=(a file);"),
        (UnknownStream("there is nothing at /v1/x/y"), "there is nothing at /v1/x/y"),
    ],
)
def test_paths_and_traces_stay_here(error: RemudaError, told: str) -> None:
    assert fields_of(error).message == told


async def test_over_both_apis_the_log_has_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: Request) -> AsyncGenerator[Output, None]:
        raise EngineFailure(TRACE)
        yield

    async with served(broken) as one:
        for stream in (False, True):
            answer = await one.http.post("/v1/completions", json=completion(stream=stream))
            assert "No space left" in answer.text
            assert "/var/" not in answer.text and "Traceback" not in answer.text
        call = inference_pb2_grpc.InferenceStub(one.channel).Generate(inference_pb2.GenerateRequest(text="Hi"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in call]
        details = caught.value.details() or ""
        assert "No space left" in details and "/var/" not in details
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len([text for text in logged if "/var/lib/remuda/x.bin" in text]) == 3


async def test_a_key_that_is_no_text_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """By grpcio, which tells what it cannot decode."""
    shown = ((b"authorization", b"Bearer hunter2\xff"),)
    async with served(says([300])) as one:
        given = GrpcInput("headers", b"/remuda.v1.Inference/ListModels", b"", headers=shown)
        answer = await call("127.0.0.1", one.front_end.grpc_port, given)
    assert answer is not None and answer.http_status == 200
    assert "hunter2" not in caplog.text
