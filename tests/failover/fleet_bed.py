"""A front end's fleet over leaders with scripted engines: everything between them is real."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from cluster.frontend.fleet import Fleet
from cluster.frontend.journal import FailoverPolicy
from cluster.replica.client import ReplicaClient
from engine.request import Output, Request
from tests.support.leader_bed import Bed, serving
from tests.support.scripted_engine import ScriptedEngine

POLICY = FailoverPolicy(max_replays=2, wait_s=5.0, reattach_s=0.5, pause_s=0.05)


@asynccontextmanager
async def fleet_of(
    num_replicas: int, policy: FailoverPolicy = POLICY, grace_s: float = 30.0
) -> AsyncIterator[tuple[Fleet, list[Bed]]]:
    """Replicas ``r0``, ``r1``, …; each engine waits behind its gate when a test wants it to."""
    async with AsyncExitStack() as stack:
        beds = [
            await stack.enter_async_context(serving(ScriptedEngine(), grace_s=grace_s)) for _ in range(num_replicas)
        ]
        fleet = Fleet(policy=policy)
        stack.push_async_callback(fleet.close)
        for index, bed in enumerate(beds):
            await fleet.add(f"r{index}", ReplicaClient(bed.address, "front-end"))
        yield fleet, beds


async def collect(fleet: Fleet, wanted: Request) -> list[Output]:
    return [output async for output in fleet.generate(wanted)]


def busy(beds: list[Bed]) -> Bed:
    """The one that has work."""
    (found,) = [bed for bed in beds if bed.engine.num_live]
    return found
