"""The process that bench/host_step.py measures: a leader whose only rank is bench/null_rank.py.

Prints its address, then one JSON line: the CPU that it used per step while all requests ran, and how long a result's
arrival and the departure of the next plan lay apart.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine as engine_package
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.heap import settle_heap
from cluster.replica.server import LeaderServer
from cluster.types import ReplicaInfo, ReplicaState
from engine.config import CacheConfig, KvGroupConfig, ParallelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.executor import Executor
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.messages import (
    BatchPlan,
    SampledToken,
    ScheduledRequest,
    StepPlan,
    StepResult,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from engine.model_config import ModelConfig

MODEL_PATH = Path(engine_package.__path__[0]) / "assets" / "remuda-tiny"
BLOCK_SIZE = 16
MAX_TOKENS = 8192
VOCAB_SIZE = 32_000
# Llama 4's shape: one group of layers that see everything, one that sees chunks.
KV_GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=4096))


class TimedHub(SocketHub):
    """Notes how long after the latest message from the rank each plan has left."""

    def __init__(self, secret: str) -> None:
        super().__init__([0], secret, [f"unix:@remuda-bench-{uuid.uuid4().hex}"])
        self.gaps_us: list[float] = []
        self._arrived_ns = 0

    def receive(self, timeout_s: float | None) -> tuple[int, bytes]:
        found = super().receive(timeout_s)
        self._arrived_ns = time.perf_counter_ns()
        return found

    def send(self, data: bytes) -> None:
        super().send(data)
        self.gaps_us.append((time.perf_counter_ns() - self._arrived_ns) / 1000)


@contextmanager
def null_gang(step_s: float) -> Iterator[tuple[ChannelExecutor, TimedHub]]:
    """An executor whose only rank is a bench.null_rank process."""
    secret = new_secret()
    hub = TimedHub(secret)
    command = [sys.executable, "-m", "bench.null_rank", hub.addresses[0], str(step_s)]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE)
    executor = ChannelExecutor(hub, ParallelConfig())
    try:
        assert rank.stdin is not None
        rank.stdin.write(secret.encode())
        rank.stdin.close()
        executor.start(ModelConfig.from_directory(str(MODEL_PATH)), block_size=BLOCK_SIZE)
        yield executor, hub
    finally:
        executor.close()
        rank.wait(10.0)


def build_engine(num_requests: int, executor: Executor) -> Engine:
    num_blocks = len(KV_GROUPS) * num_requests * (MAX_TOKENS // BLOCK_SIZE + 2) + 1
    return Engine(
        executor=executor,
        kv_groups=KV_GROUPS,
        vocab_size=VOCAB_SIZE,
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_requests, max_num_batched_tokens=max(2048, num_requests), max_model_len=MAX_TOKENS
        ),
        cache_config=CacheConfig(BLOCK_SIZE, num_blocks),
    )


def reference_step_s(num_requests: int, step_s: float, num_rounds: int = 100) -> float:
    """CPU seconds to encode and decode the plan and the result of one decoding step, once every ``step_s``.

    Paced as the leader is, for after each sleep the processor's caches hold somebody else's data.
    """
    shares = [ScheduledRequest(slot, 1000, 1, [7], [[], []], True) for slot in range(num_requests)]
    plan = StepPlan(0, 123_456, [BatchPlan([], [], shares)])
    result = StepResult(0, 123_456, 0, [SampledToken(slot, 7) for slot in range(num_requests)])
    before_s = time.thread_time()
    for _ in range(num_rounds):
        decode_to_rank(encode(plan))
        decode_from_rank(encode(result))
        time.sleep(step_s)
    return (time.thread_time() - before_s) / num_rounds


async def measure_leader(num_requests: int, executor: Executor, hub: TimedHub, seconds: float) -> dict[str, float]:
    """CPU microseconds per step of the process and of its engine thread, and what the hub saw."""
    loop = EngineLoop(build_engine(num_requests, executor))
    info = ReplicaInfo("replica-0", "null", ReplicaState.STARTING, "", 1, MAX_TOKENS, num_requests, BLOCK_SIZE, 0)
    server = LeaderServer(loop, info)
    address = await server.start()
    settle_heap()
    print(address, flush=True)
    engine_thread = next(thread for thread in threading.enumerate() if thread.name == "engine-loop")
    engine_clock = time.pthread_getcpuclockid(engine_thread.ident or 0)
    while loop.load().num_running < num_requests:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # the prefill is over
    steps, process_s, thread_s = loop.load().num_steps, time.process_time(), time.clock_gettime(engine_clock)
    hub.gaps_us.clear()
    await asyncio.sleep(seconds)
    num_steps = loop.load().num_steps - steps
    process_s, thread_s = time.process_time() - process_s, time.clock_gettime(engine_clock) - thread_s
    gaps_us = sorted(hub.gaps_us)
    await server.stop(grace_s=1.0)
    return {
        "num_steps": num_steps,
        "process_us": process_s / num_steps * 1e6,
        "engine_thread_us": thread_s / num_steps * 1e6,
        "critical_us": statistics.median(gaps_us),
        "critical_p90_us": gaps_us[len(gaps_us) * 9 // 10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.005)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    count, step_s = arguments.num_requests, arguments.step_s
    before_s = reference_step_s(count, step_s)
    with null_gang(step_s) as (executor, hub):
        figures = asyncio.run(measure_leader(count, executor, hub, arguments.seconds))
    figures["reference_us"] = (before_s + reference_step_s(count, step_s)) / 2 * 1e6
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
