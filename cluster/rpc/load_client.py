"""Greedy answers over remuda.v1 as they come, many at a time: for load, where neither text nor ids matter."""

from collections.abc import AsyncIterator

import grpc

from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from cluster.rpc.inference_client import checked_target, explained

TokenCounts = tuple[int, int, int]
"""Prompt, completion and cached tokens."""


class LoadClient:
    """One connection to a server's gRPC address.

    Args:
        target: host:port. Raises InvalidOption.
        api_key: sent as a bearer token where given.
    """

    def __init__(self, target: str, api_key: str | None = None) -> None:
        self._target = checked_target(target)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = open_channel(target)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def generate(
        self, prompt: str | list[int], model: str, max_tokens: int, ignore_eos: bool
    ) -> AsyncIterator[TokenCounts | None]:
        """None for each message with tokens, then the counts. Raises errors of our tree."""
        sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        request = inference_pb2.GenerateRequest(model=model, sampling=sampling)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        call = self._stub.Generate(request, metadata=self._metadata)
        try:
            async for response in call:
                event = response.WhichOneof("event")
                if event == "delta":
                    yield None
                elif event == "usage":
                    usage = response.usage
                    yield usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens
        except grpc.RpcError as error:
            raise explained(error, self._target) from error
        finally:
            call.cancel()

    async def model(self) -> str:
        """The first model that is served. Raises errors of our tree."""
        try:
            answer = await self._stub.ListModels(inference_pb2.ListModelsRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise explained(error, self._target) from error
        return answer.models[0].id if answer.models else ""

    async def close(self) -> None:
        await self._channel.close()
