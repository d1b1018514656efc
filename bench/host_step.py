"""Leader CPU per step without a model: step channel, scheduler, engine loop, gRPC server and frames.

The leader runs in a process of its own at a step of 5 ms; a rank that only answers is another, and this process is the
front end that reads the frames, so only the leader's CPU is counted. The critical path is the time from the arrival of
a result at the leader to the departure of the next plan. The reference, in the leader's process just before and after
and at the same pace: encoding and decoding the plan and the result of such a step with msgspec, the least that a leader
and a rank have to do.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE

from bench.measure import Row, row
from cluster.rpc import convert
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from engine.request import Request, SamplingParams

NUM_REQUESTS = (1, 64, 256)
PROMPT_TOKENS = 16
MAX_TOKENS = 8000


async def read_all(address: str, num_requests: int) -> int:
    """Sends the requests and reads frames until the leader ends the stream; their number."""
    async with open_channel(address) as channel:
        call = replica_pb2_grpc.ReplicaStub(channel).Attach()
        await call.write(replica_pb2.FrontEndFrame(hello=replica_pb2.AttachHello(front_end_id="bench")))
        for number in range(num_requests):
            prompt = [number % 100 + position for position in range(PROMPT_TOKENS)]
            sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=number)
            request = Request(f"request-{number}", prompt, PROMPT_TOKENS, sampling)
            await call.write(replica_pb2.FrontEndFrame(submit=convert.request_to_proto(number, request)))
        num_frames = 0
        async for _ in call:
            num_frames += 1
        return num_frames


async def measure(num_requests: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.host_step_leader"]
    options = ["--num-requests", str(num_requests), "--seconds", str(seconds)]
    leader = await asyncio.create_subprocess_exec(*command, *options, stdout=PIPE)
    assert leader.stdout is not None
    address = (await leader.stdout.readline()).decode().strip()
    reader = asyncio.create_task(read_all(address, num_requests))
    figures: dict[str, float] = json.loads(await leader.stdout.readline())
    num_frames = await reader
    if await leader.wait() != 0:
        raise RuntimeError(f"the measured leader ended with status {leader.returncode}")
    # One frame per step while all was measured; before it, the prefill's few.
    assert num_frames >= figures["num_steps"], f"{num_frames} frames for {figures['num_steps']} steps"
    return figures


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    found: dict[int, list[dict[str, float]]] = {count: [] for count in NUM_REQUESTS}
    for _ in range(num_repetitions):
        for count in NUM_REQUESTS:
            found[count].append(asyncio.run(measure(count, 0.3 if quick else 1.5)))
    rows = []
    for figure, notes in (
        ("critical_us", "critical path, median"),
        ("critical_p90_us", "critical path, 90 % of steps"),
        ("process_us", "CPU of the whole process"),
        ("engine_thread_us", "CPU of the engine's thread"),
    ):
        for count, repetitions in found.items():
            ours = [each[figure] for each in repetitions]
            reference = [each["reference_us"] for each in repetitions]
            case = f"{count} running, {notes}"
            rows.append(
                row(
                    "leader, per step",
                    case,
                    "µs",
                    ours,
                    reference,
                    "lower",
                    "÷ msgspec encode and decode of the same plan and result",
                )
            )
    return rows
