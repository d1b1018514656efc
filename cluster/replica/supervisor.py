"""Creates a replica's leader and ranks as detached Ray actors, watches them, and ends them.

Actors are detached because Ray kills what a dead creator owns. Those whose supervisor is gone wait under a lease, which
every ``poll`` renews, and then exit by themselves.
"""

import logging
import time
import uuid
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import StartFailed
from cluster.replica.actor import LeaderActor, RankActor
from cluster.replica.events import Event, Failed, ReplicaPlan, decode_event
from cluster.replica.leader import LeaderConfig
from cluster.replica.leader_load import LeaderLoad
from cluster.replica.model_source import ModelSource
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from cluster.replica.rendezvous import Rendezvous
from engine.config import LoadFormat
from engine.errors import RemudaError
from engine.model_config import ModelConfig
from engine.weights.loader import verify_checkpoint

_log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
NEWS_WAIT_S = 10.0
"""So long a leader may wait for an event before it answers; well below its lease."""
DRAIN_POLL_INTERVAL_S = 0.2
_SMALL_SHARE = 0.001
"""Of a node's own ``node:IP`` resource: pins a bundle to that host."""


def check_checkpoint(plan: ReplicaPlan) -> None:
    """From the files' headers alone: every tensor of the model is there and has its shape. Raises CheckpointError."""
    if plan.load_format == LoadFormat.SAFETENSORS:
        directory = ModelSource(plan.model, plan.revision).directory()
        verify_checkpoint(directory, ModelConfig.from_directory(directory, plan.quantization))


class NotReserved(StartFailed):
    """The places that a gang was to have were not free."""


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
        self._group: PlacementGroup | None = None
        self._leader: Any = None
        self._rank_actors: list[Any] = []
        self._rank_runs: dict[Any, int] = {}
        """Ray's reference of each rank's life → the rank."""
        self._failed = False
        self._question: Any = None
        """Ray's reference of the leader's next answer, and when it was asked for."""
        self._asked_s = 0.0

    def start(self) -> None:
        """Create all actors. Returns before the ranks have loaded; ``poll`` tells the rest.

        Raises:
            NotReserved: nothing was created.
            StartFailed: ``stop`` ends what was.
        """
        try:
            self._create()
        except RayError as error:
            raise StartFailed(f"replica {self.replica_id}: {_reason(error)}") from error

    def _create(self) -> None:
        suffix = uuid.uuid4().hex[:12]
        self._group = self._reserve(f"remuda-{self.replica_id}-{suffix}")
        config = LeaderConfig(
            replica_id=self.replica_id,
            plan=self._plan,
            host=self._ranks[0].host,
            rank_hosts=[placed.host for placed in self._ranks],
            secret=self._secret,
        )
        self._leader = LeaderActor.options(
            name=f"remuda-leader-{self.replica_id}-{suffix}", **self._placed(0, 0.0)
        ).remote(config.encode())
        endpoints = GangEndpoints.decode(ray.get(self._leader.open.remote(), timeout=CALL_TIMEOUT_S))
        self._rendezvous = Rendezvous(self._host)
        configs = worker_configs(self._plan, self._ranks, endpoints, self._rendezvous.host, self._rendezvous.port)
        for placed, worker in zip(self._ranks, configs, strict=True):
            actor = RankActor.options(
                name=f"remuda-rank-{self.replica_id}-{placed.rank}-{suffix}", **self._placed(placed.rank, 1.0)
            ).remote()
            self._rank_actors.append(actor)
            run = actor.run.remote(worker.encode(), self._plan.model, self._plan.revision)
            self._rank_runs[run] = placed.rank
        ray.get(self._leader.start.remote(), timeout=CALL_TIMEOUT_S)

    def _reserve(self, name: str) -> PlacementGroup:
        device = "GPU" if self._plan.device == "cuda" else "CPU"
        bundles = [{device: 1.0, f"node:{placed.host}": _SMALL_SHARE} for placed in self._ranks]
        group = placement_group(bundles, strategy="PACK", name=name, lifetime="detached")
        try:
            ray.get(group.ready(), timeout=self._reserve_timeout_s)
        except GetTimeoutError:
            remove_placement_group(group)
            raise NotReserved(
                f"Ray did not reserve {len(bundles)} × {device} for replica {self.replica_id} within "
                f"{self._reserve_timeout_s:.0f} s; something else holds them, see ray status"
            ) from None
        return group

    def _placed(self, bundle: int, share: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=bundle)
        on_gpu = self._plan.device == "cuda"
        return {
            "lifetime": "detached",
            "scheduling_strategy": strategy,
            "num_cpus": 0.0 if on_gpu else share,
            "num_gpus": share if on_gpu else 0.0,
        }

    def poll(self) -> list[Event]:
        """What happened since the last call. After a Failed of this replica there is nothing more. Renews the lease.

        The leader always has one question of ours to answer, and takes its time while there is nothing to tell: asking
        again and again would cost an idle replica more than all else.
        """
        if self._failed or self._leader is None:
            return []
        events: list[Event] = []
        try:
            events += self._news(self._leader)
        except RayError as error:
            events.append(self._failure("RankFailure", f"the leader is gone: {_reason(error)}"))
        if not any(isinstance(event, Failed) for event in events):
            events += self._dead_ranks()
        self._failed = any(isinstance(event, Failed) for event in events)
        return events

    def _news(self, leader: Any) -> list[Event]:
        """Raises RayError where the leader is gone, or silent for too long."""
        if self._question is None:
            self._ask(leader)
        answered, _ = ray.wait([self._question], timeout=0)
        if not answered and time.monotonic() < self._asked_s + NEWS_WAIT_S + CALL_TIMEOUT_S:
            return []
        lines = ray.get(self._question, timeout=0)
        self._ask(leader)
        return [decode_event(line) for line in lines.splitlines()]

    def _ask(self, leader: Any) -> None:
        self._question, self._asked_s = leader.poll.remote(NEWS_WAIT_S), time.monotonic()

    def _dead_ranks(self) -> list[Event]:
        """Ranks whose process ended before the leader could say why, for example while Ray was starting them."""
        ended, _ = ray.wait(list(self._rank_runs), num_returns=len(self._rank_runs), timeout=0)
        for run in ended:
            rank = self._rank_runs.pop(run)
            try:
                ray.get(run)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, RemudaError):
                    return [self._failure(type(cause).__name__, str(cause))]
                return [self._failure("RankFailure", f"rank {rank} raised {_reason(error)}")]
            except RayError as error:
                return [self._failure("RankFailure", f"rank {rank} died: {_reason(error)}")]
        return []

    def load(self) -> LeaderLoad | None:
        """How busy the gang is; None before it serves, and when it cannot be asked (``poll`` then tells why)."""
        try:
            data = ray.get(self._leader.load.remote(), timeout=CALL_TIMEOUT_S)
        except RayError:
            return None
        return LeaderLoad.decode(data) if data else None

    def drain(self, timeout_s: float) -> None:
        """Have the gang refuse new requests; returns when what runs has ended, or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        try:
            ray.get(self._leader.drain.remote(), timeout=CALL_TIMEOUT_S)
        except RayError:
            return
        load = self.load()
        while load is not None and not load.has_drained and time.monotonic() < deadline_s:
            time.sleep(DRAIN_POLL_INTERVAL_S)
            load = self.load()

    def _failure(self, kind: str, message: str) -> Failed:
        return Failed(kind=kind, message=message, replica=self.replica_id)

    def stop(self) -> None:
        """End the leader and the ranks, by force after STOP_TIMEOUT_S, and give their resources back."""
        if self._leader is not None:
            try:
                ray.get(self._leader.stop.remote(), timeout=STOP_TIMEOUT_S)
                ray.wait(list(self._rank_runs), num_returns=len(self._rank_runs), timeout=STOP_TIMEOUT_S)
            except RayError as error:
                _log.warning("replica %s: the leader did not stop: %s", self.replica_id, _reason(error))
        for actor in [self._leader, *self._rank_actors]:
            if actor is not None:
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._leader, self._rank_actors, self._group, self._rendezvous = None, [], None, None


def _reason(error: Exception) -> str:
    """Ray's messages hold whole tracebacks, and advice; the first sentence of the last line says what it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().split(". ")[0] if lines else type(error).__name__
