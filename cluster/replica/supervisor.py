"""Creates a replica's leader and ranks as detached Ray actors, watches them, replaces who is lost, and ends them.

Actors are detached, but their places are the supervisor's own (reservations.py), so that Ray ends them when it is gone.
Where Ray does not get to that, a lease ends them, which the supervisor renews all the time. What is to be done about a
loss, ``recovery`` decides; a thread of the supervisor's own carries it out, so that no repair waits for whoever calls
``poll``.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import StartFailed
from cluster.replica.actor import OpenCall, RankCall
from cluster.replica.actor_places import ActorPlaces
from cluster.replica.events import (
    AdaptersChanged,
    BreaksExplained,
    DrainBegun,
    Event,
    Failed,
    GangBroke,
    GangFormed,
    Notice,
    RankLoaded,
    RankPlaced,
    Repairing,
    ReplicaPlan,
    ReplicaReady,
    decode_event,
)
from cluster.replica.host_wait import HostWait
from cluster.replica.leader import LeaderConfig
from cluster.replica.leader_handle import LeaderHandle
from cluster.replica.leader_load import LeaderLoad
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_doors import RankDoors
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from cluster.replica.ray_reason import ray_reason
from cluster.replica.recovery import Action, Form, GiveUp, KillRank, Phase, Recovery, StartLeader, StartRank
from cluster.replica.rendezvous import Rendezvous
from cluster.replica.reservations import MOVE_TIMEOUT_S, ChooseHosts
from cluster.replica.silence import SILENT_S
from engine.errors import EngineFailure, RemudaError
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import new_secret

_log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
WATCH_INTERVAL_S = 0.5
IDLE_WATCH_INTERVAL_S = 2.0
"""While the gang serves: whatever happens then ends one of the calls that are waited for."""


class Supervisor:
    """One replica's.

    Args:
        replica_id: for example ``r0``.
        ranks: where each rank goes, in order of rank; the leader goes beside rank 0.
        host: this host's address, as the ranks reach it.
        secret: what front ends must show to the leader.
        choose: other hosts for ranks whose own are lost.
        reserve_timeout_s: how long Ray may take to reserve the ranks' places.
    """

    def __init__(
        self,
        replica_id: str,
        plan: ReplicaPlan,
        ranks: list[PlacedRank],
        host: str,
        secret: str,
        choose: ChooseHosts,
        reserve_timeout_s: float = PLACEMENT_TIMEOUT_S,
    ) -> None:
        self.replica_id = replica_id
        self._plan = plan
        self._ranks = ranks
        self._host = host
        self._secret = secret
        self._choose = choose
        self._reserve_timeout_s = reserve_timeout_s
        self._rendezvous: Rendezvous | None = None
        self._places: ActorPlaces | None = None
        self._door_secret = new_secret()
        self._leader: LeaderHandle | None = None
        self._actors: dict[int, Any] = {}
        self._doors = RankDoors(self._door_secret)
        self._runs: dict[Any, tuple[int, int]] = {}
        """Ray's reference of each rank's life → the rank, and which of its lives it is."""
        self._num_blocks = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._recovery = Recovery(len(ranks), time.monotonic())
        self._due: deque[Action] = deque()
        """What recovery wants and has not been done."""
        self._host_wait = HostWait(max(plan.host_wait_s, MOVE_TIMEOUT_S))
        self._looked_s = 0.0
        self._is_draining = False
        self._last_leader_port = 0
        self._adapters = plan.lora_modules
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def start(self) -> None:
        """Create all actors. Returns before the ranks have loaded; ``poll`` tells the rest.

        Raises:
            NotReserved: nothing was created.
            StartFailed: ``stop`` ends what was.
        """
        try:
            self._places = ActorPlaces(
                self.replica_id,
                self._ranks,
                self._host,
                self._door_secret,
                self._choose,
                self._plan.device == "cuda",
                self._plan.spare_ranks,
                self._reserve_timeout_s,
            )
            self._start_leader()
            for placed in self._ranks:
                self._start_rank(placed.rank)
            self._form(0)
        except (RayError, ChannelClosed) as error:
            raise StartFailed(f"replica {self.replica_id}: {ray_reason(error)}") from error
        self._thread.start()

    def poll(self) -> list[Event]:
        """What happened since the last call. After a Failed of this replica there is nothing more."""
        return [self._events.get() for _ in range(self._events.qsize())]

    # ---- the supervisor's thread -----------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            while not self._stopping.is_set() and self._recovery.phase is not Phase.FAILED:
                ended = self._await_end()
                if not self._stopping.is_set():
                    self._look(ended)
        except Exception as error:  # noqa: BLE001  (a defect: the replica is lost, and that must be told)
            if not self._stopping.is_set():
                _log.exception("replica %s: its supervisor failed", self.replica_id)
                self._events.put(Failed(type(error).__name__, str(error), self.replica_id))

    def _await_end(self) -> list[Any]:
        """The first call that ends, if one does before it is time to look."""
        interval_s = IDLE_WATCH_INTERVAL_S if self._recovery.phase is Phase.SERVING else WATCH_INTERVAL_S
        calls = [*([] if self._leader is None else [self._leader.question]), *self._runs]
        if not calls:
            self._stopping.wait(interval_s)
            return []
        return list(ray.wait(calls, num_returns=1, timeout=interval_s)[0])

    def _look(self, ended: list[Any]) -> None:
        now_s = time.monotonic()
        if self._leader is not None and self._leader.question in ended:
            self._take_news(self._leader)
        elif self._leader is not None and self._leader.is_silent(now_s):
            self._carry_out(self._lose_leader(f"has answered nothing for {SILENT_S:g} s"))
        for run in [run for run in ended if run in self._runs]:
            self._note_end(run)
        self._carry_out(self._recovery.tick(now_s))
        if self._recovery.phase is Phase.FORMING:
            self._look_for_hosts(now_s)
            for rank in self._doors.silent(self._recovery.awaited, now_s):
                reason = f"rank {rank} does not answer"
                self._carry_out(self._recovery.rank_ended(rank, self._recovery.life_of(rank), reason, now_s))
        elif self._recovery.phase is Phase.SERVING:
            assert self._places is not None
            self._places.keep_spares(now_s)

    def _take_news(self, leader: LeaderHandle) -> None:
        try:
            lines = leader.take_news()
        except RayError as error:
            self._carry_out(self._lose_leader(f"is gone: {ray_reason(error)}"))
            return
        for line in lines:
            self._note(decode_event(line))

    def _lose_leader(self, how: str) -> list[Action]:
        """It may hang only, and must not come back."""
        assert self._places is not None
        if self._leader is not None:
            self._leader.kill()
            self._leader = None
        reason = f"the leader on {self._places.hosts[0]} {how}"
        return self._recovery.leader_ended(self._recovery.leader_life, reason, time.monotonic())

    def _note(self, event: Event) -> None:
        recovery, now_s = self._recovery, time.monotonic()
        if isinstance(event, Failed):
            self._fail(event)
            return
        self._events.put(event)
        if isinstance(event, RankPlaced):
            recovery.rank_joined(event.epoch, event.rank)
        elif isinstance(event, RankLoaded):
            recovery.rank_loaded(event.epoch, event.rank)
        elif isinstance(event, GangFormed):
            self._num_blocks = event.num_blocks
            recovery.formed(event.epoch)
        elif isinstance(event, ReplicaReady):
            self._last_leader_port = int(event.address.rpartition(":")[2])
        elif isinstance(event, GangBroke):
            self._carry_out(recovery.gang_broke(event.epoch, event.culprit, event.message, now_s))
        elif isinstance(event, BreaksExplained):
            recovery.explained(event.num_breaks)
        elif isinstance(event, DrainBegun):
            self._is_draining = True
        elif isinstance(event, AdaptersChanged):
            self._adapters = event.adapters

    def _note_end(self, run: Any) -> None:
        rank, life = self._runs.pop(run)
        try:
            ray.get(run)
            reason = f"rank {rank} left"
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RemudaError) and not isinstance(cause, EngineFailure):
                # Nothing that another process could do better: a broken checkpoint, too little memory.
                self._fail(Failed(type(cause).__name__, str(cause), self.replica_id))
                return
            reason = f"rank {rank} raised {ray_reason(error)}"
        except RayError as error:
            reason = f"rank {rank} died: {ray_reason(error)}"
        self._carry_out(self._recovery.rank_ended(rank, life, reason, time.monotonic()))

    def _look_for_hosts(self, now_s: float) -> None:
        """Ray waits for ever with an actor whose host is gone."""
        if now_s < self._looked_s + 2.0:
            return
        self._looked_s = now_s
        assert self._places is not None
        newcomers = self._newcomers()
        for rank, host in self._places.lost():
            if rank not in newcomers:
                reason = f"rank {rank} is lost with its host {host}"
                self._carry_out(self._recovery.rank_ended(rank, self._recovery.life_of(rank), reason, now_s))

    def _fail(self, failed: Failed) -> None:
        self._recovery.impossible(failed.message)
        self._events.put(failed)

    # ---- what recovery wants ---------------------------------------------------------------------------------------

    def _carry_out(self, actions: Iterable[Action]) -> None:
        """What cannot be done yet waits, and a formation that waits is replaced by a newer one. What fails is news for
        recovery, which then wants something else instead."""
        self._want(list(actions))
        while self._due and not self._stopping.is_set() and not self._waits_for_host(self._due[0]):
            action = self._due.popleft()
            try:
                self._do(action)
            except StartFailed as error:
                self._due = deque(self._recovery.impossible(f"{self._recovery.reason}; {error}"))
            except (RayError, ChannelClosed) as error:
                self._want(self._lose_leader(f"is gone: {ray_reason(error)}"))

    def _waits_for_host(self, action: Action) -> bool:
        """Whether nobody has room for a newcomer yet, and somebody may still come who has. The others are told to
        stay meanwhile."""
        assert self._places is not None
        now_s = time.monotonic()
        rank = action.rank if isinstance(action, StartRank) else 0 if isinstance(action, StartLeader) else None
        has_room = rank is None or self._places.find_room(rank)
        waits = self._host_wait.goes_on(has_room, now_s)
        if waits and self._host_wait.is_time_to_tell(now_s):
            text = f"replica {self.replica_id}: rank {rank} waits for a host with room for it: {self._places.why_not}"
            self._events.put(Notice(text))
            for rank in self._doors.ranks - self._newcomers():
                self._doors.tell(rank, "stay")
            if self._leader is not None:
                self._leader.tell("stay")
        return waits

    def _newcomers(self) -> set[int]:
        """Ranks that will be started."""
        return {action.rank for action in self._due if isinstance(action, StartRank)}

    def _want(self, actions: list[Action]) -> None:
        if not actions:
            return
        self._due = deque([*(action for action in self._due if not isinstance(action, Form)), *actions])
        ranks = [action.rank for action in actions if isinstance(action, StartRank)]
        leader = any(isinstance(action, StartLeader) for action in actions)
        if any(isinstance(action, Form) for action in actions):
            assert self._places is not None
            lost = ", ".join(f"rank {rank} on {self._places.hosts[rank]}" for rank in ranks)
            message = f"{self._recovery.reason} ({lost})" if lost else self._recovery.reason
            self._events.put(Repairing(self.replica_id, self._recovery.epoch, ranks, leader, message))

    def _do(self, action: Action) -> None:
        if isinstance(action, KillRank):
            if (actor := self._actors.pop(action.rank, None)) is not None:
                ray.kill(actor, no_restart=True)
        elif isinstance(action, StartRank):
            self._start_rank(action.rank)
        elif isinstance(action, StartLeader):
            self._start_leader()
        elif isinstance(action, Form):
            self._form(action.epoch)
        elif isinstance(action, GiveUp):
            self._events.put(Failed("RankFailure", action.reason, self.replica_id))

    def _start_leader(self) -> None:
        assert self._places is not None
        self._places.move(0)
        hosts = self._places.hosts
        plan = msgspec.structs.replace(self._plan, lora_modules=self._adapters)
        config = LeaderConfig(
            self.replica_id, plan, hosts[0], hosts, self._secret, self._is_draining, self._last_leader_port
        )
        self._leader = LeaderHandle(self._places.new_leader(config.encode()), self._door_secret)

    def _start_rank(self, rank: int) -> None:
        """An empty process in the rank's place; ``_form`` gives it something to do."""
        assert self._places is not None
        actor = self._actors[rank] = self._places.new_rank(rank)
        self._doors.add(rank, actor.door.remote())

    def _form(self, epoch: int) -> None:
        """Raises RayError or ChannelClosed where the leader is gone."""
        if self._rendezvous is not None:
            self._rendezvous.close()  # frees those that wait for a lost rank there
        assert self._places is not None and self._leader is not None
        hosts = self._places.hosts
        endpoints = GangEndpoints.decode(self._leader.call("open", msgspec.msgpack.encode(OpenCall(epoch, hosts))))
        rendezvous = self._rendezvous = Rendezvous(self._host)
        placed = [PlacedRank(rank, host) for rank, host in enumerate(hosts)]
        store, loaded = (rendezvous.host, rendezvous.port), self._recovery.loaded
        configs = worker_configs(
            self._plan, placed, endpoints, *store, epoch=epoch, num_blocks=self._num_blocks, loaded=loaded
        )
        running = dict(self._runs.values())
        for rank, config in enumerate(configs):
            life = self._recovery.life_of(rank)
            call = msgspec.msgpack.encode(RankCall(config.encode(), self._plan.model, self._plan.revision))
            if running.get(rank) == life:
                self._doors.tell(rank, "form", call)  # whoever does not join is replaced
            else:
                self._runs[self._actors[rank].run.remote(call)] = rank, life
        self._leader.begin()
        self._recovery.told(epoch, time.monotonic())

    # ---- from outside ----------------------------------------------------------------------------------------------

    def load(self) -> LeaderLoad | None:
        """How busy the gang is; None before it serves, and when it cannot be asked (``poll`` then tells why)."""
        leader = self._leader
        return None if leader is None else leader.load()

    def drain(self, timeout_s: float) -> None:
        """Have the gang refuse new requests; returns when what runs has ended, or the time is up."""
        self._is_draining = True
        if (leader := self._leader) is not None:
            leader.drain(timeout_s)

    def stop(self) -> None:
        """End the leader and the ranks, by force after STOP_TIMEOUT_S, and give their resources back."""
        self._stopping.set()
        has_stopped = self._stop_leader()  # which ends what the thread waits for
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if has_stopped and self._runs:
            ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
        if self._leader is not None:
            self._leader.kill()
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        if self._places is not None:
            self._places.release()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._leader, self._actors, self._places, self._rendezvous = None, {}, None, None

    def _stop_leader(self) -> bool:
        """False: there is none, or it is gone."""
        if self._leader is None:
            return False
        try:
            self._leader.call("stop")
        except (RayError, ChannelClosed) as error:
            _log.warning("replica %s: the leader did not stop: %s", self.replica_id, ray_reason(error))
            return False
        return True
