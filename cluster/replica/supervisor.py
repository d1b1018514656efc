"""Creates a replica's leader and ranks as detached Ray actors, watches them, replaces who is lost, and ends them.

Actors are detached because Ray kills what a dead creator owns. Those whose supervisor is gone wait under a lease, which
it renews all the time, and then exit by themselves. What is to be done about a loss, ``recovery`` decides; a thread of
the supervisor's own carries it out, so that no repair waits for whoever calls ``poll``.
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
from cluster.replica.actor_places import ActorPlaces, NotReserved, living_hosts
from cluster.replica.events import (
    BreaksExplained,
    Event,
    Failed,
    GangBroke,
    GangFormed,
    RankLoaded,
    RankPlaced,
    Repairing,
    ReplicaPlan,
    decode_event,
)
from cluster.replica.leader import LeaderConfig
from cluster.replica.leader_load import LeaderLoad
from cluster.replica.model_source import ModelSource
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from cluster.replica.recovery import Action, Form, GiveUp, KillRank, Phase, Recovery, StartLeader, StartRank
from cluster.replica.rendezvous import Rendezvous
from cluster.replica.side_door import knock
from engine.config import LoadFormat
from engine.errors import EngineFailure, RemudaError
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import new_secret
from engine.model_config import ModelConfig
from engine.weights.loader import verify_checkpoint

_log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
NEWS_WAIT_S = 10.0
"""So long a leader may wait for an event before it answers; well below its lease."""
WATCH_INTERVAL_S = 0.5
DRAIN_POLL_INTERVAL_S = 0.2


def check_checkpoint(plan: ReplicaPlan) -> None:
    """From the files' headers alone: every tensor of the model is there and has its shape. Raises CheckpointError."""
    if plan.load_format == LoadFormat.SAFETENSORS:
        directory = ModelSource(plan.model, plan.revision).directory()
        verify_checkpoint(directory, ModelConfig.from_directory(directory, plan.quantization))


class Supervisor:
    """One replica's.

    Args:
        replica_id: for example ``r0``.
        ranks: where each rank goes, in order of rank; the leader goes beside rank 0.
        host: this host's address, as the ranks reach it.
        secret: what front ends must show to the leader.
        reserve_timeout_s: how long Ray may take to reserve the ranks' places.
    """

    def __init__(
        self,
        replica_id: str,
        plan: ReplicaPlan,
        ranks: list[PlacedRank],
        host: str,
        secret: str,
        reserve_timeout_s: float = PLACEMENT_TIMEOUT_S,
    ) -> None:
        self.replica_id = replica_id
        self._plan = plan
        self._ranks = ranks
        self._host = host
        self._secret = secret
        self._reserve_timeout_s = reserve_timeout_s
        self._rendezvous: Rendezvous | None = None
        self._places: ActorPlaces | None = None
        self._door_secret = new_secret()
        self._leader: Any = None
        self._leader_door: Any = None
        """Ray's reference of its address."""
        self._leader_has_begun = False
        self._actors: dict[int, Any] = {}
        self._doors: dict[int, Any] = {}
        """Of ``_actors``."""
        self._runs: dict[Any, tuple[int, int]] = {}
        """Ray's reference of each rank's life → the rank, and which of its lives it is."""
        self._num_blocks = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._recovery = Recovery(len(ranks), time.monotonic())
        self._question: Any = None
        """Ray's reference of the leader's next answer, and when it was asked for."""
        self._asked_s = 0.0
        self._looked_s = 0.0
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
                self._plan.device == "cuda",
                self._plan.spare_ranks,
                self._reserve_timeout_s,
            )
            self._start_leader()
            for placed in self._ranks:
                self._start_rank(placed.rank)
            self._form(0)
        except (RayError, ChannelClosed) as error:
            raise StartFailed(f"replica {self.replica_id}: {_reason(error)}") from error
        self._ask()
        self._thread.start()

    def poll(self) -> list[Event]:
        """What happened since the last call. After a Failed of this replica there is nothing more."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    # ---- the supervisor's thread -----------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            while not self._stopping.is_set() and self._recovery.phase is not Phase.FAILED:
                ended, _ = ray.wait([self._question, *self._runs], num_returns=1, timeout=WATCH_INTERVAL_S)
                if not self._stopping.is_set():
                    self._look(ended)
        except Exception as error:  # noqa: BLE001  (a defect: the replica is lost, and that must be told)
            if not self._stopping.is_set():
                _log.exception("replica %s: its supervisor failed", self.replica_id)
                self._events.put(Failed(type(error).__name__, str(error), self.replica_id))

    def _look(self, ended: list[Any]) -> None:
        now_s = time.monotonic()
        if self._question in ended or now_s > self._asked_s + NEWS_WAIT_S + CALL_TIMEOUT_S:
            self._take_news()
        for run in [run for run in ended if run in self._runs]:
            self._note_end(run)
        self._carry_out(self._recovery.tick(now_s))
        if self._recovery.phase is Phase.FORMING:
            self._look_for_hosts(now_s)
        elif self._recovery.phase is Phase.SERVING:
            assert self._places is not None
            self._places.keep_spares(now_s)

    def _take_news(self) -> None:
        """The leader always has one question of ours to answer, and takes its time while there is nothing to tell:
        asking again and again would cost an idle replica more than all else."""
        life = self._recovery.leader_life
        try:
            lines = ray.get(self._question, timeout=0)
        except RayError as error:
            ray.kill(self._leader, no_restart=True)  # it may be silent only
            reason = f"the leader is gone: {_reason(error)}"
            self._carry_out(self._recovery.leader_ended(life, reason, time.monotonic()))
            return
        self._ask()
        for line in lines.splitlines():
            self._note(decode_event(line))

    def _ask(self) -> None:
        self._question, self._asked_s = self._leader.poll.remote(NEWS_WAIT_S), time.monotonic()

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
        elif isinstance(event, GangBroke):
            self._carry_out(recovery.gang_broke(event.epoch, event.culprit, event.message, now_s))
        elif isinstance(event, BreaksExplained):
            recovery.explained(event.num_breaks)

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
            reason = f"rank {rank} raised {_reason(error)}"
        except RayError as error:
            reason = f"rank {rank} died: {_reason(error)}"
        self._carry_out(self._recovery.rank_ended(rank, life, reason, time.monotonic()))

    def _look_for_hosts(self, now_s: float) -> None:
        """Ray waits for ever with an actor whose host is gone."""
        if now_s < self._looked_s + 2.0:
            return
        self._looked_s = now_s
        assert self._places is not None
        living = living_hosts()
        for rank, host in enumerate(self._places.hosts):
            if host not in living:
                reason = f"rank {rank} is lost with its host {host}"
                life = self._recovery.life_of(rank)
                self._carry_out(self._recovery.rank_ended(rank, life, reason, now_s))

    def _fail(self, failed: Failed) -> None:
        self._recovery.impossible(failed.message)
        self._events.put(failed)

    # ---- what recovery wants ---------------------------------------------------------------------------------------

    def _carry_out(self, actions: Iterable[Action]) -> None:
        """What fails on the way is news for recovery, which then wants something else instead."""
        due = deque(actions)
        if due:
            self._announce(due)
        while due and not self._stopping.is_set():
            action = due.popleft()
            try:
                self._do(action)
            except NotReserved as error:
                due = deque(self._recovery.impossible(str(error)))
            except (RayError, ChannelClosed) as error:
                reason = f"the leader is gone: {_reason(error)}"
                due = deque(self._recovery.leader_ended(self._recovery.leader_life, reason, time.monotonic()))

    def _announce(self, actions: Iterable[Action]) -> None:
        ranks = [action.rank for action in actions if isinstance(action, StartRank)]
        leader = any(isinstance(action, StartLeader) for action in actions)
        if any(isinstance(action, Form) for action in actions):
            epoch, reason = self._recovery.epoch, self._recovery.reason
            self._events.put(Repairing(self.replica_id, epoch, ranks, leader, reason))

    def _do(self, action: Action) -> None:
        if isinstance(action, KillRank):
            if (actor := self._actors.pop(action.rank, None)) is not None:
                ray.kill(actor, no_restart=True)
        elif isinstance(action, StartRank):
            self._start_rank(action.rank)
        elif isinstance(action, StartLeader):
            self._start_leader()
            self._ask()
        elif isinstance(action, Form):
            self._form(action.epoch)
        elif isinstance(action, GiveUp):
            self._events.put(Failed("RankFailure", action.reason, self.replica_id))

    def _start_leader(self) -> None:
        assert self._places is not None
        self._places.find(0)
        hosts = self._places.hosts
        config = LeaderConfig(
            replica_id=self.replica_id, plan=self._plan, host=hosts[0], rank_hosts=hosts, secret=self._secret
        )
        self._leader = self._places.new_leader(config.encode())
        self._leader_door = self._leader.door.remote()
        self._leader_has_begun = False

    def _start_rank(self, rank: int) -> None:
        """An empty process in the rank's place; ``_form`` gives it something to do."""
        assert self._places is not None
        actor = self._actors[rank] = self._places.new_rank(rank)
        self._doors[rank] = actor.door.remote()

    def _form(self, epoch: int) -> None:
        """Raises RayError or ChannelClosed where the leader is gone."""
        if self._rendezvous is not None:
            self._rendezvous.close()  # frees those that wait for a lost rank there
        assert self._places is not None
        hosts = self._places.hosts
        endpoints = GangEndpoints.decode(self._ask_leader("open", msgspec.msgpack.encode(OpenCall(epoch, hosts))))
        rendezvous = self._rendezvous = Rendezvous(self._host)
        placed = [PlacedRank(rank, host) for rank, host in enumerate(hosts)]
        configs = worker_configs(
            self._plan, placed, endpoints, rendezvous.host, rendezvous.port, epoch=epoch, num_blocks=self._num_blocks
        )
        running = dict(self._runs.values())
        for rank, config in enumerate(configs):
            life = self._recovery.life_of(rank)
            call = msgspec.msgpack.encode(RankCall(config.encode(), self._plan.model, self._plan.revision))
            if running.get(rank) == life:
                # One that does not answer must not hold up the others; whoever does not join is replaced.
                told = threading.Thread(
                    target=_tell_rank, args=(self._doors[rank], self._door_secret, call), daemon=True
                )
                told.start()
            else:
                self._runs[self._actors[rank].run.remote(call)] = rank, life
        if not self._leader_has_begun:
            self._leader_has_begun = True
            self._ask_leader("start")
        self._recovery.told(epoch, time.monotonic())

    def _ask_leader(self, name: str, argument: bytes = b"", timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """Whatever else the leader does. Raises RayError or ChannelClosed where it is gone."""
        address = ray.get(self._leader_door, timeout=timeout_s)
        return knock(address, self._door_secret, name, argument, timeout_s)

    # ---- from outside ----------------------------------------------------------------------------------------------

    def load(self) -> LeaderLoad | None:
        """How busy the gang is; None before it serves, and when it cannot be asked (``poll`` then tells why)."""
        try:
            data = self._ask_leader("load")
        except (RayError, ChannelClosed):
            return None
        return LeaderLoad.decode(data) if data else None

    def drain(self, timeout_s: float) -> None:
        """Have the gang refuse new requests; returns when what runs has ended, or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        try:
            self._ask_leader("drain")
        except (RayError, ChannelClosed):
            return
        load = self.load()
        while load is not None and not load.has_drained and time.monotonic() < deadline_s:
            time.sleep(DRAIN_POLL_INTERVAL_S)
            load = self.load()

    def stop(self) -> None:
        """End the leader and the ranks, by force after STOP_TIMEOUT_S, and give their resources back."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self._leader is not None:
            try:
                self._ask_leader("stop", timeout_s=STOP_TIMEOUT_S)
                ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
            except (RayError, ChannelClosed, ValueError) as error:
                _log.warning("replica %s: the leader did not stop: %s", self.replica_id, _reason(error))
        for actor in [self._leader, *self._actors.values()]:
            if actor is not None:
                ray.kill(actor, no_restart=True)
        if self._places is not None:
            self._places.release()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._leader, self._actors, self._places, self._rendezvous = None, {}, None, None


def _tell_rank(door: Any, secret: str, call: bytes) -> None:
    """``door``: Ray's reference of its address. Whether it heard shows by its joining."""
    try:
        knock(ray.get(door, timeout=CALL_TIMEOUT_S), secret, "form", call, CALL_TIMEOUT_S)
    except (RayError, ChannelClosed) as error:
        _log.warning("a rank was not told of the next formation: %s", _reason(error))


def _reason(error: Exception) -> str:
    """Ray's messages hold whole tracebacks, and advice; the first sentence of the last line says what it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().split(". ")[0] if lines else type(error).__name__
