"""The client of the command line, at the one moment of a stream that no test can meet with a real server: the answer is
whole, and the connection breaks before the call's status."""

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2
from cluster.rpc.inference_client import GenerateOptions, InferenceClient, Summary, TextDelta


class CutAfterUsage:
    """A server that tells nothing twice of what a client says it had. Whether it had the usage, it cannot say."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []

    def generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        new = inference_pb2.GenerateResponse
        if not request.HasField("resume"):
            yield new(request_id="a", delta=inference_pb2.Delta(text="Hi", token_ids=[1, 2]))
            yield new(request_id="a", finished=inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP))
        yield new(request_id="a", usage=inference_pb2.Usage(num_prompt_tokens=3, num_completion_tokens=2))
        if len(self.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")

    def handler(self) -> grpc.GenericRpcHandler:
        generate = grpc.unary_stream_rpc_method_handler(
            self.generate,
            request_deserializer=inference_pb2.GenerateRequest.FromString,
            response_serializer=inference_pb2.GenerateResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("remuda.v1.Inference", {"Generate": generate})


@pytest.mark.timeout(30)
def test_an_answer_that_is_whole_is_not_asked_for_again() -> None:
    service, server = CutAfterUsage(), grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with InferenceClient(f"127.0.0.1:{port}") as client:
            assert list(client.generate("Hello", GenerateOptions())) == [TextDelta("Hi", (1, 2)), Summary("stop", 3, 2)]
    finally:
        server.stop(None).wait()
    assert len(service.requests) == 1
