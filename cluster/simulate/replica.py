"""A replica of the simulation: its supervisor, its ranks and its leader, each of which can be lost at any moment.

What is to be done about a loss, the real cluster.replica.recovery decides; here its actions take their time and events
come late, as between real processes.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.replica.recovery import Action, Form, GiveUp, KillRank, Recovery, StartLeader, StartRank
from cluster.replica.silence import SILENT_S, Silence
from cluster.simulate.leader import SimulatedLeader
from cluster.simulate.network import Network
from cluster.simulate.process import Process
from engine.errors import RankFailure

NUM_RANKS = 2
DETECTION_S = 0.05
"""From a rank's death to the leader's knowledge of it; Ray takes up to ten times as long."""
STALL_NOTICED_S = 2.0
"""From a rank's stop to the watchdog's verdict, where the others wait for it."""
POLL_S = 0.5


@dataclass
class _Rank:
    """One life of a rank."""

    number: int
    life: int
    is_dead: bool = False
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    moving: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while the process is stopped."""


class SimulatedReplica:
    """Args:
    name: its id, through all its leaders.
    host: where it runs.
    network: through which its leader is reached.
    seed: of all its chance.
    announce: told of each leader that serves, as front ends are by the supervisor's events.
    poison: (seed, position) of requests that kill a rank whenever it computes that.
    depth: plans that its gang may have in flight.
    """

    def __init__(
        self,
        name: str,
        host: str,
        network: Network,
        seed: str,
        announce: Callable[["SimulatedReplica"], None],
        poison: set[tuple[int, int]],
        depth: int,
    ) -> None:
        self.name = name
        self.host = host
        self.network = network
        self.chance = random.Random(f"{seed} {name}")
        self.announce = announce
        self.poison = poison
        self.depth = depth
        self.slowness = 1.0
        self.disk_slowness = 1.0
        self.has_given_up = False
        self.num_steps = 0
        self.on_step: Callable[[], None] = lambda: None
        """Called as each step begins."""
        self.supervisor = Process(f"supervisor {name}", f"s{host}", network)
        self._news: asyncio.Queue[Callable[[], list[Action] | None]] = asyncio.Queue()
        self.recovery = Recovery(NUM_RANKS, self.now_s())
        self._ranks = [self._new_rank(number, 0) for number in range(NUM_RANKS)]
        self.leader = SimulatedLeader(self, 0)
        self._heard: tuple[SimulatedLeader, Silence] = self.leader, Silence(self.now_s())
        """Who has answered, and for how long it has not."""
        self.supervisor.spawn(self._supervise())
        self._carry_out(Form(0))

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def tell(self, event: Callable[[], list[Action] | None], after_s: float = 0.0) -> None:
        """The supervisor hears of it then, in its own order; what it answers is carried out."""
        asyncio.get_running_loop().call_later(after_s, self._news.put_nowait, event)

    async def _supervise(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    event = await self._news.get()
            except TimeoutError:
                actions: list[Action] | None = self.recovery.tick(self.now_s())
            else:
                actions = event()
            for action in [*(actions or ()), *self._look_at_leader()]:
                self._carry_out(action)

    def _look_at_leader(self) -> list[Action]:
        """One that hangs is replaced, as the real supervisor does it."""
        leader, now_s = self.leader, self.now_s()
        if leader.awake.is_set() or self._heard[0] is not leader:
            self._heard = leader, Silence(now_s)
        elif self._heard[1].look(now_s) >= SILENT_S:
            self._kill_leader()
            return self.recovery.leader_ended(leader.life, f"has answered nothing for {SILENT_S:g} s", now_s)
        return []

    def _kill_leader(self) -> None:
        self.leader.process.kill()
        self._wake(self.leader)

    def _wake(self, leader: SimulatedLeader) -> None:
        if not leader.awake.is_set():
            leader.awake.set()
            self.network.resume(self.host)

    def _carry_out(self, action: Action) -> None:
        match action:
            case KillRank(number):
                self._end(self._ranks[number])
            case StartRank(number, life):
                self._ranks[number] = self._new_rank(number, life)
            case StartLeader(life):
                self._kill_leader()
                self.leader = SimulatedLeader(self, life)
            case Form(epoch):
                self.supervisor.spawn(self._form(epoch))
            case GiveUp(_):
                self.has_given_up = True
                self.leader.give_up()

    def _new_rank(self, number: int, life: int) -> _Rank:
        rank = _Rank(number, life)
        rank.moving.set()
        start_s = self.chance.choice([0.3, 3.0]) + self.disk_slowness * self.chance.uniform(0.1, 2.0)
        asyncio.get_running_loop().call_later(start_s, rank.loaded.set)
        return rank

    async def _form(self, epoch: int) -> None:
        leader = self.leader
        await leader.opened.wait()
        self.recovery.told(epoch, self.now_s())
        joined: set[int] = set()
        for rank in list(self._ranks):
            self.supervisor.spawn(self._join(rank, epoch, leader, joined))

    async def _join(self, rank: _Rank, epoch: int, leader: SimulatedLeader, joined: set[int]) -> None:
        await asyncio.sleep(self.chance.uniform(0.02, 0.3))
        await rank.moving.wait()
        await leader.awake.wait()
        if not self._are_alive(rank, leader):
            return
        self.tell(lambda: self.recovery.rank_joined(epoch, rank.number))
        await rank.loaded.wait()
        await asyncio.sleep(self.chance.uniform(0.02, 0.2))
        await rank.moving.wait()
        await leader.awake.wait()
        if not self._are_alive(rank, leader):
            return
        self.tell(lambda: self.recovery.rank_loaded(epoch, rank.number))
        joined.add(rank.number)
        if len(joined) == NUM_RANKS and epoch == self.recovery.epoch:
            self.tell(lambda: self.recovery.formed(epoch))
            leader.formed(epoch)

    @staticmethod
    def _are_alive(rank: _Rank, leader: SimulatedLeader) -> bool:
        return not rank.is_dead and not leader.process.is_dead

    # ---- faults ---------------------------------------------------------------------------------------------------

    def lose_rank(self, number: int) -> None:
        """kill -9."""
        self._end(self._ranks[number])

    def _end(self, rank: _Rank) -> None:
        if rank.is_dead:
            return
        rank.is_dead = True
        rank.moving.set()
        self.leader.lose_gang(RankFailure(f"rank {rank.number} is lost", rank.number), DETECTION_S)
        event = lambda: self.recovery.rank_ended(rank.number, rank.life, "it died", self.now_s())  # noqa: E731
        self.tell(event, self.chance.uniform(1.0, 10.0) * DETECTION_S)

    async def stop_rank(self, number: int, duration_s: float) -> None:
        """SIGSTOP, and SIGCONT later: nothing moves meanwhile, unless the watchdog has named the rank before."""
        rank = self._ranks[number]
        rank.moving.clear()
        self.leader.moving.clear()
        leader = self.leader
        await asyncio.sleep(min(duration_s, STALL_NOTICED_S))
        if duration_s > STALL_NOTICED_S and not rank.is_dead and leader.is_serving:
            leader.lose_gang(RankFailure(f"rank {number} stalls", number), 0.0)
        leader.moving.set()
        await asyncio.sleep(max(0.0, duration_s - STALL_NOTICED_S))
        rank.moving.set()

    def lose_leader(self) -> None:
        """kill -9 of the leader; its ranks live on."""
        leader = self.leader
        if leader.process.is_dead:
            return
        self._kill_leader()
        event = lambda: self.recovery.leader_ended(leader.life, "it died", self.now_s())  # noqa: E731
        self.tell(event, self.chance.uniform(1.0, 10.0) * DETECTION_S)

    async def hang_leader(self, duration_s: float) -> None:
        """SIGSTOP of the leader, if it has begun, and SIGCONT later, if it has not been replaced."""
        leader = self.leader
        if leader.process.is_dead or not leader.opened.is_set():
            return
        leader.awake.clear()
        self.network.stop(self.host)
        await asyncio.sleep(duration_s)
        self._wake(leader)

    def kill(self) -> None:
        """All of it, at the end of a run."""
        self.leader.process.kill()
        self.supervisor.kill()
