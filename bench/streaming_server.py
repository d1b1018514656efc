"""The server processes that bench/streaming.py measures. Each prints its address and serves until its input ends.

leader      a leader over a mock engine: one frame per step with a token of every stream
reference   plain grpc.aio: one stream per request, one message per token
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop

import engine
from bench.mock_engine import MockEngine
from cluster.frontend.app import FrontEnd, FrontEndConfig
from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.heap import settle_heap
from cluster.replica.server import LeaderServer
from cluster.rpc.channel import SERVER_OPTIONS
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from cluster.types import ReplicaInfo, ReplicaState

TOKENIZER_PATH = Path(engine.__path__[0]) / "assets" / "remuda-tiny"


class ReferenceService(inference_pb2_grpc.InferenceServicer):
    """What a server does that sends each token in a message of its own."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        due_s = asyncio.get_running_loop().time()
        for token_id in range(request.sampling.max_tokens):
            if self._step_s > 0:
                due_s += self._step_s
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
            delta = inference_pb2.Delta(choice=0, token_ids=[token_id], position=token_id)
            yield inference_pb2.GenerateResponse(request_id=request.request_id, delta=delta)

    async def Cancel(self, request: object, context: object) -> inference_pb2.CancelResponse:
        raise NotImplementedError

    async def Tokenize(self, request: object, context: object) -> inference_pb2.TokenizeResponse:
        raise NotImplementedError

    async def Detokenize(self, request: object, context: object) -> inference_pb2.DetokenizeResponse:
        raise NotImplementedError

    async def Embed(self, request: object, context: object) -> inference_pb2.EmbedResponse:
        raise NotImplementedError

    async def ListModels(self, request: object, context: object) -> inference_pb2.ListModelsResponse:
        raise NotImplementedError


async def serve_reference(step_s: float) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(ReferenceService(step_s), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settle_heap()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


async def serve_front_end(leader: str) -> None:
    fleet = Fleet()
    await fleet.add("replica-0", ReplicaClient(leader, "bench"))
    front_end = FrontEnd(FrontEndConfig("mock", TOKENIZER_PATH, port=0, grpc_port=0), fleet)
    await front_end.start()
    settle_heap()
    print(f"127.0.0.1:{front_end.port} 127.0.0.1:{front_end.grpc_port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await front_end.stop()
    await fleet.close()


async def serve_leader(step_s: float) -> None:
    engine = MockEngine(step_s, asyncio.get_running_loop())
    info = ReplicaInfo("replica-0", "mock", ReplicaState.STARTING, "", 1, 1 << 20, 1024, 16, 1)
    server = LeaderServer(EngineLoop(engine), info)
    address = await server.start()
    settle_heap()
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["leader", "front-end", "reference"])
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--leader", default="")
    arguments = parser.parse_args()
    if arguments.kind == "front-end":
        uvloop.run(serve_front_end(arguments.leader))  # as remuda serve does
    elif arguments.kind == "leader":
        asyncio.run(serve_leader(arguments.step_s))
    else:
        asyncio.run(serve_reference(arguments.step_s))


if __name__ == "__main__":
    main()
