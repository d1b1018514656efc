"""One simulated deployment: replicas, front ends, clients, and what goes wrong, all drawn from a seed."""

import asyncio
import random
from typing import Any

from cluster.simulate.draw import draw_record
from cluster.simulate.faults import Fault, FaultKind, Scenario
from cluster.simulate.front_end import SimulatedFrontEnd
from cluster.simulate.network import Connection, End, Network
from cluster.simulate.process import Process
from cluster.simulate.promises import check
from cluster.simulate.record import Record
from cluster.simulate.replica import NUM_RANKS, SimulatedReplica

NUM_REPLICAS = 2
NUM_FRONT_ENDS = 2
START_S = 20.0
LONGEST_S = 600.0
"""Of a run: all requests have had their chances by then."""
FRONT_END_START_S = 2.0
SETTLE_S = 100.0
"""After the last request's end: grace times pass, and everything must have come to rest."""


class World:
    """Args:
    scenario: what happens; its seed is the source of all chance.
    """

    def __init__(self, scenario: Scenario) -> None:
        seed = str(scenario.seed)
        self.scenario = scenario
        self.network = Network(random.Random(f"{seed} network"))
        self._poison: set[tuple[int, int]] = set()
        """(seed, position) of requests that kill a rank whenever it computes that."""
        self._driver = Process("driver", "driver", self.network)
        self.front_ends = [SimulatedFrontEnd(f"f{i}", f"e{i}", self.network, seed) for i in range(NUM_FRONT_ENDS)]
        self.replicas = [
            SimulatedReplica(f"r{i}", f"h{i}", self.network, seed, self._announce, self._poison, scenario.depth)
            for i in range(NUM_REPLICAS)
        ]
        self.records: list[Record] = []
        self.ended_s = 0.0

    def _announce(self, replica: SimulatedReplica) -> None:
        for front_end in self.front_ends:
            if not front_end.process.is_dead:
                front_end.process.spawn(front_end.join(replica))

    async def run(self) -> None:
        """Raises AssertionError where a promise is broken, Stuck where somebody waits for ever."""
        await self._until_ready()
        troubles = [asyncio.create_task(self._cause(fault)) for fault in self.scenario.faults]
        clients = [asyncio.create_task(self._client(number)) for number in range(self.scenario.num_clients)]
        _, waiting = await asyncio.wait([*clients, *troubles], timeout=LONGEST_S)
        assert not waiting, f"after {LONGEST_S:g} s somebody still waits"
        await asyncio.gather(*clients, *troubles)
        await self._settle()
        self.ended_s = asyncio.get_running_loop().time()
        check(self.scenario, self.records, self.replicas)
        for front_end in self.front_ends:
            await front_end.kill()
        for replica in self.replicas:
            replica.kill()

    async def _until_ready(self) -> None:
        """All front ends know all replicas; not for ever, where one of them is lost already."""
        for _ in range(int(START_S / 0.1)):
            if all(len(front_end.fleet.replicas()) == NUM_REPLICAS for front_end in self.front_ends):
                return
            await asyncio.sleep(0.1)

    async def _settle(self) -> None:
        """Returns when nothing is under way any more, or has had its time."""
        for _ in range(int(SETTLE_S)):
            await asyncio.sleep(1.0)
            leaders = [replica.leader for replica in self.replicas]
            if all(leader.engine is not None and not leader.engine.has_work for leader in leaders) and not any(
                leader.server is not None and leader.server.num_live_requests for leader in leaders
            ):
                return

    async def _cause(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        replica, front_end = self.replicas[fault.replica], self.front_ends[fault.front_end]
        match fault.kind:
            case FaultKind.LEADER_DIES:
                replica.lose_leader()
            case FaultKind.LEADER_HANGS:
                await replica.hang_leader(fault.duration_s)
            case FaultKind.RANK_DIES:
                replica.lose_rank(fault.front_end % NUM_RANKS)
            case FaultKind.HOST_DIES:
                replica.lose_leader()
                for number in range(NUM_RANKS):
                    replica.lose_rank(number)
            case FaultKind.RANK_STOPS:
                await replica.stop_rank(fault.front_end % NUM_RANKS, fault.duration_s)
            case FaultKind.LINK_CUT:
                self.network.cut(replica.host, front_end.host)
                await asyncio.sleep(fault.duration_s)
                self.network.heal(replica.host, front_end.host)
            case FaultKind.CONNECTION_RESET:
                self.network.reset(replica.host, front_end.host)
            case FaultKind.SLOW_STEPS:
                replica.slowness = 10.0
                await asyncio.sleep(fault.duration_s)
                replica.slowness = 1.0
            case FaultKind.SLOW_DISK:
                replica.disk_slowness = 30.0
                await asyncio.sleep(fault.duration_s)
                replica.disk_slowness = 1.0
            case FaultKind.SLOW_LINK:
                self.network.slowness = 100.0
                await asyncio.sleep(fault.duration_s)
                self.network.slowness = 1.0
            case FaultKind.FRAME_TWICE:
                self._change_next_message(replica, [0.0, 0.0])
            case FaultKind.FRAMES_SWAPPED:
                self._change_next_message(replica, [0.1])
            case FaultKind.CLOCK_JUMP:
                front_end.clock.jump(fault.duration_s)
            case FaultKind.DRAIN:
                await replica.leader.drain()
            case FaultKind.FRONT_END_DIES:
                await self._lose_front_end(fault.front_end)

    def lose_process(self, host: str) -> None:
        """kill -9 of the leader or the front end there."""
        for replica in self.replicas:
            if replica.host == host:
                replica.lose_leader()
        for index, front_end in enumerate(self.front_ends):
            if front_end.host == host:
                self._driver.spawn(self._lose_front_end(index))

    async def _lose_front_end(self, index: int) -> None:
        """Its clients go to another one; a new process takes its place."""
        former = self.front_ends[index]
        if former.process.is_dead:
            return
        await former.kill()
        await asyncio.sleep(FRONT_END_START_S)
        fresh = SimulatedFrontEnd(f"{former.process.name}+", former.host, self.network, str(self.scenario.seed))
        self.front_ends[index] = fresh
        for replica in self.replicas:
            if not replica.leader.process.is_dead and replica.leader.server is not None:
                fresh.process.spawn(fresh.join(replica))

    def _change_next_message(self, replica: SimulatedReplica, late_s: list[float]) -> None:
        """The next of this replica's leader arrives once for each entry, so many seconds too late."""

        def meddle(connection: Connection, sender: End, message: Any) -> list[tuple[Any, float]]:
            if sender.host != replica.host or message[0] != "message":
                return [(message, 0.0)]
            self.network.meddle = None
            return [(message, late) for late in late_s]

        self.network.meddle = meddle

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self.scenario.seed} client {number}")
        await asyncio.sleep(chance.uniform(0.0, self.scenario.spread_s))
        record = draw_record(self.scenario, number)
        if record.poison_at is not None:
            self._poison.add((number, record.poison_at))
        self.records.append(record)
        while not record.has_ended:
            front_end = chance.choice(self.front_ends)
            if not front_end.process.is_dead:
                await asyncio.wait([front_end.process.spawn(front_end.run(record))])
                if not record.has_ended:
                    record.cut()
            await asyncio.sleep(chance.uniform(0.1, 3.0))
