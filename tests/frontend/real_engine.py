"""A backend that computes: the engine with one rank in this process, on a checkpoint."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from cluster.errors import UnknownStream
from cluster.frontend.stored_call import FoundCall
from cluster.types import ReplicaInfo
from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Output, Request
from tests.frontend.scripted import replica_info


class RealBackend:
    """Steps while there is work. ``close`` at the end."""

    def __init__(self, directory: Path, kv_cache_bytes: int = 2**20) -> None:
        config = WorkerConfig(
            rank=0,
            channel_address="",
            secret="",
            model=str(directory),
            dtype=Dtype.FLOAT32,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            block_size=4,
            kv_cache_memory_bytes=kv_cache_bytes,
        )
        self._executor = InProcessExecutor(config)
        model = ModelConfig.from_directory(config.model)
        self.max_model_len = self._executor.ready.max_model_len
        self._engine = Engine(
            executor=self._executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                max_num_seqs=4, max_num_batched_tokens=64, max_model_len=self.max_model_len, depth=config.depth
            ),
            cache_config=self._executor.ready.cache,
        )
        self._queues: dict[str, asyncio.Queue[Output]] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def generate(
        self, request: Request, keep: object = None, holder: object = None
    ) -> AsyncGenerator[Output, None]:
        queue = self._queues[request.request_id] = asyncio.Queue()
        self._engine.add(request)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            while True:
                output = await queue.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            del self._queues[request.request_id]
            self._engine.abort(request.request_id)

    async def _step(self) -> None:
        while self._engine.has_work:
            for output in self._engine.step():
                if output.request_id in self._queues:
                    self._queues[output.request_id].put_nowait(output)
            await asyncio.sleep(0)

    async def find(self, call_id: str) -> FoundCall:
        raise UnknownStream(f"nobody has the request {call_id!r}")

    def abandon(self, found: FoundCall) -> None:
        raise NotImplementedError("what nobody has is abandoned by nobody")

    def replicas(self) -> Sequence[ReplicaInfo]:
        return [replica_info(max_model_len=self.max_model_len)]

    async def drain(self, replica: str) -> None:
        raise NotImplementedError("no test drains it")

    def close(self) -> None:
        self._executor.close()
