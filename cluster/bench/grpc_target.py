"""remuda.v1, which takes text or token ids."""

import time
from typing import Self

from cluster.bench.target import LoadRequest
from cluster.bench.timing import Timing
from cluster.rpc.load_client import LoadClient


class GrpcTarget:
    def __init__(self, client: LoadClient, model: str, ignore_eos: bool = True) -> None:
        self._client = client
        self._ignore_eos = ignore_eos
        self.model = model

    @classmethod
    async def open(cls, address: str, model: str = "", *, api_key: str | None = None, ignore_eos: bool = True) -> Self:
        """``address``: host:port. Without ``model`` the first one (the base model) is taken.

        Raises InvalidOption, Unavailable, Unauthenticated.
        """
        client = LoadClient(address, api_key)
        try:
            model = model or await client.model()
        except BaseException:
            await client.close()
            raise
        return cls(client, model, ignore_eos)

    async def run(self, request: LoadRequest, timing: Timing) -> None:
        timing.sent_s = time.perf_counter()
        async for counts in self._client.generate(request.prompt, self.model, request.num_output, self._ignore_eos):
            if counts is None:
                timing.chunks_s.append(time.perf_counter())
            else:
                timing.num_input, timing.num_output, timing.num_cached = counts
                timing.is_counted = True
        timing.finish(time.perf_counter())

    async def close(self) -> None:
        await self._client.close()
