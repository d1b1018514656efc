"""``python -m tests.failover.leader_process NAME DIRECTORY``: a leader with one rank in this process, without Ray.
Prints its address and serves until standard input ends."""

import asyncio
import secrets
import sys

from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from cluster.types import RankInfo, ReplicaInfo, ReplicaState
from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups


async def main(name: str, directory: str) -> None:
    config = WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=directory,
        dtype=Dtype.FLOAT32,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=4,
        kv_cache_memory_bytes=8 * 2**20,
    )
    executor = InProcessExecutor(config)
    ready = executor.ready
    model = ModelConfig.from_directory(config.model)
    scheduler = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=ready.max_model_len, depth=config.depth
    )
    engine = Engine(
        executor=executor,
        kv_groups=kv_groups(model),
        vocab_size=model.vocab_size,
        scheduler_config=scheduler,
        cache_config=ready.cache,
    )
    info = ReplicaInfo(
        id=name,
        model="m",
        state=ReplicaState.STARTING,
        address="",
        incarnation=secrets.randbits(63),
        max_model_len=ready.max_model_len,
        max_num_seqs=8,
        block_size=4,
        num_blocks=ready.cache.num_blocks,
        ranks=(RankInfo(0, 0, "here", "cpu", "ready"),),
    )
    server = LeaderServer(EngineLoop(engine), info)
    print(await server.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    executor.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
