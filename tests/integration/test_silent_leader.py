"""A leader that falls silent without closing its connection (a stopped process, a dropped link) is noticed."""

import asyncio
import os
import signal
import sys
import time

import pytest

from cluster.errors import Unavailable
from cluster.replica.client import ReplicaClient
from engine.request import Request, SamplingParams

# gRPC's keepalive: 10 s of silence, 5 s for the answer, and some for a loaded machine.
NOTICED_WITHIN_S = 25.0

LEADER = """
import asyncio
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from tests.support.leader_bed import INFO
from tests.support.scripted_engine import ScriptedEngine

async def main():
    engine = ScriptedEngine()
    engine.gate.clear()
    print(await LeaderServer(EngineLoop(engine), INFO).start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.full
async def test_a_stopped_leader_ends_its_streams_in_bounded_time() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", LEADER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    client = ReplicaClient((await process.stdout.readline()).decode().strip(), "front-end-0")
    try:
        await client.connect()
        stream = client.generate(Request("a", [1, 2], 2, SamplingParams(max_tokens=5)))
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.5)
        os.kill(process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(reader, NOTICED_WITHIN_S)
        assert time.monotonic() - began_s > 1.0, "it was the silence that was noticed, not an end"
        os.kill(process.pid, signal.SIGCONT)
        async with asyncio.timeout(NOTICED_WITHIN_S):
            while not client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        await client.close()
        process.kill()
        await process.wait()
