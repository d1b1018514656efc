"""Where a replica's actors go, and the ones that stand by: all that the supervisor asks of Ray to have a process."""

import contextlib
import secrets
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.replica.actor import RANK_LEASE_S, LeaderActor, RankActor
from cluster.replica.control_service import ControlService, ControlServiceSilent
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.reservations import ChooseHosts, Reservations


@dataclass
class _Spare:
    """A process that stands by. ``ready``: Ray's reference of its answer."""

    actor: Any
    ready: Any
    asked_s: float


class ActorPlaces:
    """The places of one replica's ranks; they are reserved at construction.

    Args:
        name: of the replica, for its actors' names.
        host: of the supervisor, who knocks at the actors' side doors.
        secret: of the side doors.
        choose: other hosts for ranks whose own are lost.
        on_gpu: a rank takes a GPU; otherwise a CPU slot.
        num_spares: that stand by on each host.
        timeout_s: how long Ray may take to reserve the places.

    Raises NotReserved; nothing was created then.
    """

    def __init__(
        self,
        name: str,
        ranks: list[PlacedRank],
        host: str,
        secret: str,
        choose: ChooseHosts,
        on_gpu: bool,
        num_spares: int,
        timeout_s: float,
    ) -> None:
        self._name = name
        self._host = host
        self._secret = secret
        self._on_gpu = on_gpu
        # Ray shows no GPU to a process that was not given one.
        self._num_spares = 0 if on_gpu else num_spares
        self.control = ControlService(ray.get_runtime_context().gcs_address)
        self._reserved = Reservations(name, ranks, "GPU" if on_gpu else "CPU", self.control, choose, timeout_s)
        self._spares: dict[str, list[_Spare]] = {}
        """By host."""

    @property
    def hosts(self) -> list[str]:
        """Each rank's."""
        return [place.host for place in self._reserved.places]

    def new_leader(self, config: bytes) -> Any:
        """Beside rank 0, whose place must be on a living host."""
        options = LeaderActor.options(name=self._actor_name("leader"), **self._options(0, 0.0))
        return self.control.ask(lambda: options.remote(config, *self._door(0)))

    def new_rank(self, rank: int) -> Any:
        """A spare where one is ready on the rank's host. Raises NotReserved where there is no place, and
        ControlServiceSilent."""
        if self.control.answers() or not self._has_spare(self.hosts[rank]):
            self.move(rank)
        spare = self._take_spare(self.hosts[rank])
        if spare is not None:
            return spare
        return self._new_actor(f"rank-{rank}", rank, 1.0)

    def _new_actor(self, role: str, rank: int, share: float) -> Any:
        options = RankActor.options(name=self._actor_name(role), **self._options(rank, share))
        return self.control.ask(lambda: options.remote(*self._door(rank)))

    def _door(self, rank: int) -> tuple[str, str]:
        """Of an actor on the rank's host: where it is to listen, and the secret."""
        host = self.hosts[rank]
        is_near = host == self._host
        return f"unix:@remuda-{secrets.token_hex(12)}" if is_near else f"tcp:{host}:0", self._secret

    def _actor_name(self, role: str) -> str:
        return f"remuda-{self._name}-{role}-{uuid.uuid4().hex[:12]}"

    @property
    def why_not(self) -> str:
        """Why ``find_room`` found none."""
        return self._reserved.why_not

    def find_room(self, rank: int) -> bool:
        """Whether the rank has a place: its own, or another that is reserved for it now. Where Ray cannot be asked,
        only a spare has one."""
        if not self.control.answers():
            return self._has_spare(self.hosts[rank])
        try:
            return self._reserved.find_room(rank)
        except (ControlServiceSilent, RayError):
            return False

    def move(self, rank: int) -> None:
        """To another host, where the rank's own is gone. Raises NotReserved or ControlServiceSilent."""
        self._reserved.move(rank)

    def _options(self, rank: int, share: float) -> dict[str, Any]:
        place = self._reserved.places[rank]
        return {
            "lifetime": "detached",
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=place.group, placement_group_bundle_index=place.bundle
            ),
            "num_cpus": 0.0 if self._on_gpu else share,
            "num_gpus": share if self._on_gpu else 0.0,
        }

    def keep_spares(self, now_s: float) -> None:
        """As many as wanted on each host of the gang, each with its lease renewed."""
        self.control.look(now_s)
        with contextlib.suppress(ControlServiceSilent):  # spares are no necessity
            self._keep_spares(now_s)

    def _keep_spares(self, now_s: float) -> None:
        for rank, host in enumerate(self.hosts):
            spares = self._spares.setdefault(host, [])
            while len(spares) < self._num_spares and self.control.answers():
                actor = self._new_actor("spare", rank, 0.0)
                spares.append(_Spare(actor, actor.stand_by.remote(), now_s))
            for spare in [spare for spare in spares if now_s > spare.asked_s + RANK_LEASE_S / 3]:
                if _has_answered(spare.ready):
                    spare.ready, spare.asked_s = spare.actor.stand_by.remote(), now_s
                elif now_s > spare.asked_s + RANK_LEASE_S:
                    spares.remove(spare)
                    ray.kill(spare.actor, no_restart=True)

    def _has_spare(self, host: str) -> bool:
        return any(_has_answered(spare.ready) for spare in self._spares.get(host, []))

    def _take_spare(self, host: str) -> Any:
        """None where none is ready there."""
        spares = self._spares.get(host, [])
        for spare in list(spares):
            if _has_answered(spare.ready):
                spares.remove(spare)
                return spare.actor
        return None

    def release(self) -> None:
        """End the spares and give the places back."""
        for spares in self._spares.values():
            for spare in spares:
                ray.kill(spare.actor, no_restart=True)
        if self.control.answers():
            self._reserved.release()

    def lost(self) -> list[tuple[int, str]]:
        """Ranks whose host is gone, with the host; none where nobody can be asked."""
        if not self.control.answers():
            return []
        try:
            return self._reserved.lost()
        except ControlServiceSilent:
            return []


def _has_answered(reference: Any) -> bool:
    answered, _ = ray.wait([reference], timeout=0)
    if not answered:
        return False
    try:
        ray.get(reference)
    except RayError:
        return False
    return True
