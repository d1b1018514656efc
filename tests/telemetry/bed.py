"""A front end over leaders whose engines compute with simulated ranks, each with an exporter of its own; everything
that makes, carries and sends spans is real."""

import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from cluster.frontend.fleet import Fleet
from cluster.frontend.journal import FailoverPolicy
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from cluster.simulate.gang import SimulatedGang
from cluster.telemetry.tracing import open_telemetry
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.rank_times import RankTimes
from engine.messages import StepPlan, StepResult
from tests.frontend.servers import Served, serving_front_end
from tests.support.leader_bed import INFO

VOCAB_SIZE = 2048
GROUPS = (KvGroupConfig((0,)),)
NUM_BLOCKS = 400


class HeldGang(SimulatedGang):
    """Computes its first steps, and where there is ``may_go_on``, the others when that is set."""

    NUM_STEPS = 20
    may_go_on: threading.Event | None = None

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        if self.may_go_on is not None and len(self.plans) >= self.NUM_STEPS:
            assert self.may_go_on.wait(60)
        return super().submit(plan)


@dataclass
class Site:
    """What a test talks to. ``add`` starts one more replica."""

    served: Served
    fleet: Fleet
    stack: AsyncExitStack
    endpoint: str | None

    async def add(
        self,
        replica: str,
        dies_at: set[tuple[int, int]] | None = None,
        may_go_on: threading.Event | None = None,
    ) -> LeaderServer:
        """``dies_at``: (seed, position) pairs whose computation breaks its gang for good. ``may_go_on``: it stops after
        some steps until this is set."""
        gang = HeldGang(
            num_slots=16,
            kv_groups=GROUPS,
            block_size=4,
            num_blocks=NUM_BLOCKS,
            vocab_size=VOCAB_SIZE,
            depth=1,
            dies_at=dies_at,
        )
        gang.may_go_on = may_go_on
        engine = Engine(
            executor=gang,
            kv_groups=GROUPS,
            vocab_size=VOCAB_SIZE,
            scheduler_config=SchedulerConfig(16, 64, 1024, 64, 1),
            cache_config=CacheConfig(block_size=4, num_blocks=NUM_BLOCKS),
            clock=RankTimes(2).moment,
        )
        telemetry = open_telemetry(self.endpoint, "remuda-leader", replica)
        self.stack.callback(telemetry.close)
        info = replace(INFO, id=replica, max_model_len=1024)
        server = LeaderServer(EngineLoop(engine), info, tracer=telemetry.tracer)
        address = await server.start()
        self.stack.push_async_callback(server.stop)
        await self.fleet.add(replica, ReplicaClient(address, "front-end"))
        return server


@asynccontextmanager
async def site(endpoint: str | None, *replicas: str) -> AsyncIterator[Site]:
    """``endpoint`` None: nothing is traced."""
    async with AsyncExitStack() as stack:
        telemetry = open_telemetry(endpoint, "remuda-frontend", "front-end-0")
        fleet = Fleet(policy=FailoverPolicy(pause_s=0.05), tracer=telemetry.tracer)
        served = await stack.enter_async_context(serving_front_end(fleet, telemetry=telemetry))
        stack.push_async_callback(fleet.close)
        one = Site(served, fleet, stack, endpoint)
        for replica in replicas:
            await one.add(replica)
        yield one
