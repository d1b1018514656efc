"""A leader hangs while a stream of it runs, and another takes its place: what the front end does meanwhile."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from cluster.frontend import fleet as fleet_module
from cluster.frontend.fleet import Fleet
from cluster.frontend.journal import FailoverPolicy
from cluster.replica.client import ReplicaClient
from cluster.types import ReplicaInfo, ReplicaState
from tests.failover.fleet_bed import POLICY
from tests.support.leader_bed import request, serving, tokens_of, until
from tests.support.scripted_engine import answer

pytestmark = pytest.mark.timeout(60)
LOST_AFTER_S = 0.2
LEADER = """
import asyncio
from dataclasses import replace
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from tests.support.leader_bed import INFO
from tests.support.scripted_engine import ScriptedEngine

async def main():
    server = LeaderServer(EngineLoop(ScriptedEngine()), replace(INFO, incarnation=1))
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Impatient(ReplicaClient):
    """Takes a leader for silent soon."""

    num_asked = 0

    async def info(self, timeout_s: float = 0.3) -> ReplicaInfo:
        self.num_asked += 1
        return await super().info(timeout_s)


@dataclass
class Hung:
    """``client``: of the leader that was stopped while it streamed to ``fleet``. ``lost``: whether all was."""

    fleet: Fleet
    client: Impatient
    lost: asyncio.Event

    async def look_again(self) -> None:
        """The fleet has asked the leader in vain for longer than LOST_AFTER_S."""
        await until(lambda: self.fleet.replicas()[0].state is ReplicaState.FAILED)
        num_asked = self.client.num_asked
        await until(lambda: self.lost.is_set() or self.client.num_asked >= num_asked + 3)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "REFRESH_INTERVAL_S", 0.05)
    monkeypatch.setattr(fleet_module, "IDLE_REFRESH_INTERVAL_S", 0.1)


@asynccontextmanager
async def fleet_over_leader(policy: FailoverPolicy = POLICY) -> AsyncIterator[tuple[Hung, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", LEADER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    client = Impatient((await process.stdout.readline()).decode().strip(), "front-end")
    lost = asyncio.Event()
    fleet = Fleet(lost.set, policy=policy, lost_after_s=LOST_AFTER_S)
    try:
        await fleet.add("r0", client)
        yield Hung(fleet, client, lost), process
    finally:
        await fleet.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_stream_waits_for_the_leader_that_takes_the_place_of_one_that_hangs() -> None:
    wanted = request("a", 20_000)
    async with fleet_over_leader() as (hung, process):
        stream = hung.fleet.generate(wanted)
        outputs = [await anext(stream)]
        os.kill(process.pid, signal.SIGSTOP)
        await hung.fleet.await_leader("r0")
        await hung.look_again()
        assert not hung.lost.is_set(), "the supervisor repairs it"
        async with serving() as bed:
            await hung.fleet.add("r0", ReplicaClient(bed.address, "front-end"))
            outputs += [output async for output in stream]
            assert tokens_of(outputs) == answer(wanted)
            assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert bed.engine.num_steps > 0, "the rest came from it"
            assert not hung.lost.is_set()


async def test_a_stream_is_more_patient_than_usual_while_its_leader_is_being_replaced() -> None:
    wanted, patience_s = request("a", 20_000), 0.3
    async with fleet_over_leader(replace(POLICY, wait_s=patience_s)) as (hung, process):
        stream = hung.fleet.generate(wanted)
        outputs = [await anext(stream)]
        await hung.fleet.await_leader("r0")
        process.kill()

        async def rest() -> None:
            outputs.extend([output async for output in stream])

        reading = asyncio.create_task(rest())
        ended, _ = await asyncio.wait([reading], timeout=5 * patience_s)
        assert not ended, reading
        async with serving() as bed:
            await hung.fleet.add("r0", ReplicaClient(bed.address, "front-end"))
            await reading
            assert tokens_of(outputs) == answer(wanted)


async def test_a_replica_whose_new_leader_hangs_too_is_lost() -> None:
    """It was said to be there: nobody is repairing any more."""
    async with fleet_over_leader() as (hung, process):
        await hung.fleet.await_leader("r0")
        hung.client = again = Impatient(hung.client.address, "front-end")
        await hung.fleet.add("r0", again)
        os.kill(process.pid, signal.SIGSTOP)
        await hung.look_again()
        assert hung.lost.is_set()
