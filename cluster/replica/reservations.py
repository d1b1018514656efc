"""Where the ranks of one replica have their places: what Ray holds for them, on which hosts.

The places of the beginning are bundles of one placement group, each bound to the address of its host. Where a host is
lost, Ray keeps the bundle for a node with the same address: when one comes, it is reserved for this replica again,
whether the rank has moved meanwhile or not. So it is free for the next rank that needs a place. What is reserved for a
move is bound to the address of the new host, in a group of its own, which is given back when that host is lost too.

All ranks that have lost their hosts get new ones together, as placement chooses them: a rank alone cannot tell whether
its group stays whole.

Whoever reserves also owns: when the supervisor is gone (its actor, or else its job in Ray), Ray ends what runs in the
places, and they are free for the replica that replaces it. Detached groups would be held for ever, for nobody but this
supervisor knows them.
"""

import functools
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.errors import StartFailed
from cluster.replica.control_service import ControlService
from cluster.replica.placed_rank import PlacedRank
from engine.errors import LayoutError

_log = logging.getLogger(__name__)

MOVE_TIMEOUT_S = 20.0
"""So long a rank without a host waits for another one, at least."""
_RESERVE_TIMEOUT_S = 5.0
"""How long Ray may take to reserve on a host what was free there a moment ago."""
_SMALL_SHARE = 0.001
"""Of a node's own ``node:IP`` resource: pins a bundle to that host."""


class NotReserved(StartFailed):
    """The places that a gang was to have were not free."""


ChooseHosts = Callable[[Mapping[int, str], Mapping[str, int]], Mapping[int, str]]
"""The addresses of the hosts of a gang's other ranks, from those of the ranks that have one, and from how many slots on
each address are held for ranks that do not. Raises LayoutError where there is no room, StartFailed where Ray does not
answer."""


@dataclass(frozen=True)
class Place:
    """Where a rank's process goes: a bundle of a placement group, bound to a host. It comes back with its host."""

    group: PlacementGroup
    bundle: int
    host: str


class Reservations:
    """Made at construction. Raises NotReserved; nothing is held then.

    Args:
        name: of the replica.
        ranks: where each goes, in order of rank.
        device: Ray's name of what a rank takes one of.
        choose: other hosts for ranks whose own are lost.
        timeout_s: how long Ray may take.
    """

    def __init__(
        self,
        name: str,
        ranks: list[PlacedRank],
        device: str,
        control: ControlService,
        choose: ChooseHosts,
        timeout_s: float,
    ) -> None:
        self._name = name
        self._device = device
        self._control = control
        self._choose = choose
        (self._group,) = self._reserve([[placed.host for placed in ranks]], timeout_s)
        self._places = [Place(self._group, placed.rank, placed.host) for placed in ranks]
        self._homeless: set[int] = set()
        """Ranks whose place is not theirs any more, as its host was lost."""
        self._next: dict[int, Place] = {}
        """Of homeless ranks: reserved, and not moved to yet."""
        self._vacant: list[Place] = []
        """Of ``_group``."""
        self.why_not = ""
        """Why ``find_room`` found none."""

    @property
    def places(self) -> list[Place]:
        """Each rank's, or the one that it had."""
        return list(self._places)

    def lost(self) -> list[tuple[int, str]]:
        """Ranks whose host is gone, with the host. Raises ControlServiceSilent."""
        living = self._living()
        return [(rank, place.host) for rank, place in enumerate(self._places) if not self._stands(rank, living)]

    def find_room(self, rank: int) -> bool:
        """Whether the rank has a place: its own, or another. Where it has none, places are reserved for all ranks
        whose hosts are lost, or else ``why_not`` says why not. Raises ControlServiceSilent."""
        living = self._living()
        if self._stands(rank, living):
            return True
        self._leave_lost(living)
        if rank not in self._next:
            try:
                self._next |= self._reserve_next(living)
            except (LayoutError, StartFailed) as error:
                self.why_not = str(error)
                return False
        return True

    def move(self, rank: int) -> None:
        """To another place, where the host of the rank's own is gone. Raises NotReserved or ControlServiceSilent."""
        if self._stands(rank, self._living()):
            return
        if not self.find_room(rank):
            raise NotReserved(f"replica {self._name} has no place for rank {rank}: {self.why_not}")
        if (place := self._next.pop(rank, None)) is None:
            return  # its host came back between two looks
        former, self._places[rank] = self._places[rank], place
        self._homeless.discard(rank)
        _log.warning("replica %s: rank %d moves from %s to %s", self._name, rank, former.host, place.host)

    def release(self) -> None:
        """Give all places back."""
        held = [*self._next.values(), *(p for rank, p in enumerate(self._places) if rank not in self._homeless)]
        for group in [self._group, *(place.group for place in held if place.group is not self._group)]:
            remove_placement_group(group)

    def _stands(self, rank: int, living: set[str]) -> bool:
        return rank not in self._homeless and self._places[rank].host in living

    def _leave_lost(self, living: set[str]) -> None:
        """Whatever becomes of the places on lost hosts, they are not their ranks' any more."""
        for rank, place in enumerate(self._places):
            if rank not in self._homeless and place.host not in living:
                self._homeless.add(rank)
                self._leave(place)
        for rank, place in list(self._next.items()):
            if place.host not in living:
                self._leave(self._next.pop(rank))

    def _leave(self, place: Place) -> None:
        if place.group is self._group:
            self._vacant.append(place)
        else:
            self._control.ask(lambda: remove_placement_group(place.group))

    def _reserve_next(self, living: set[str]) -> dict[int, Place]:
        """For all ranks that have no place. Raises LayoutError, NotReserved or ControlServiceSilent; nothing is
        reserved then."""
        kept = {rank: place.host for rank, place in enumerate(self._places) if rank not in self._homeless}
        kept |= {rank: place.host for rank, place in self._next.items()}
        vacant = [place for place in self._vacant if place.host in living]
        held = Counter(place.host for place in vacant)
        chosen = self._control.ask(lambda: self._choose(kept, held))
        found: dict[int, Place] = {}
        for rank, host in chosen.items():
            if (place := next((place for place in vacant if place.host == host), None)) is not None:
                vacant.remove(place)
                found[rank] = place
        others = {rank: host for rank, host in chosen.items() if rank not in found}
        groups = self._reserve([[host] for host in others.values()], _RESERVE_TIMEOUT_S)
        self._vacant = [place for place in self._vacant if place not in found.values()]
        return found | {rank: Place(group, 0, host) for (rank, host), group in zip(others.items(), groups, strict=True)}

    def _reserve(self, groups: list[list[str]], timeout_s: float) -> list[PlacementGroup]:
        """A placement group for each list of hosts, with a bundle on each of them."""
        made = []
        for hosts in groups:
            name = f"remuda-{self._name}-{uuid.uuid4().hex[:12]}"
            bundles = [{self._device: 1.0, f"node:{host}": _SMALL_SHARE} for host in hosts]
            made.append(self._control.ask(functools.partial(placement_group, bundles, strategy="PACK", name=name)))
        try:
            ray.get([group.ready() for group in made], timeout=timeout_s)
        except GetTimeoutError:
            for group in made:
                remove_placement_group(group)
            raise NotReserved(
                f"Ray did not reserve {sum(map(len, groups))} × {self._device} for replica {self._name} within "
                f"{timeout_s:.0f} s; something else holds them, see ray status"
            ) from None
        return made

    def _living(self) -> set[str]:
        """Addresses of hosts. Raises ControlServiceSilent."""
        return {node["NodeManagerAddress"] for node in self._control.ask(ray.nodes) if node["Alive"]}
