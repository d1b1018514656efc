"""Where the ranks of one replica have their places: what Ray holds for them, on which hosts.

The places of the beginning are bundles of one placement group, each bound to the address of its host. Where a host is
lost, Ray keeps the bundle for a node with the same address: when one comes, it is reserved for this replica again,
whether the rank has moved meanwhile or not. So the next rank that needs a place goes where one was left. What is
reserved for a move is bound to no address. Ray would hold it anywhere else when its node is lost, so it is given back
then.

Whoever reserves also owns: when the supervisor is gone (its actor, or else its job in Ray), Ray ends what runs in the
places, and they are free for the replica that replaces it. Detached groups would be held for ever, for nobody but this
supervisor knows them.
"""

import logging
import uuid
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.errors import StartFailed
from cluster.replica.control_service import ControlService
from cluster.replica.placed_rank import PlacedRank

_log = logging.getLogger(__name__)

MOVE_TIMEOUT_S = 20.0
"""How long Ray may take to find another host for a rank."""
_SMALL_SHARE = 0.001
"""Of a node's own ``node:IP`` resource: pins a bundle to that host."""


class NotReserved(StartFailed):
    """The places that a gang was to have were not free."""


@dataclass(frozen=True)
class Place:
    """Where a rank's process goes: a bundle of a placement group, on a host.

    ``node_id``: of the host's present life in Ray, where the place is bound to that; None: it comes back with its host.
    """

    group: PlacementGroup
    bundle: int
    host: str
    node_id: str | None = None

    def lives(self, living: dict[str, str]) -> bool:
        """``living``: the host of each living node."""
        return self.host in living.values() if self.node_id is None else self.node_id in living


class Reservations:
    """Made at construction. Raises NotReserved; nothing is held then.

    Args:
        name: of the replica.
        ranks: where each goes, in order of rank.
        device: Ray's name of what a rank takes one of.
        timeout_s: how long Ray may take.
    """

    def __init__(
        self, name: str, ranks: list[PlacedRank], device: str, control: ControlService, timeout_s: float
    ) -> None:
        self._name = name
        self._device = device
        self._control = control
        group = self._reserve([{device: 1.0, f"node:{placed.host}": _SMALL_SHARE} for placed in ranks], timeout_s)
        self._places = [Place(group, placed.rank, placed.host) for placed in ranks]
        self._group = group
        self._homeless: set[int] = set()
        """Ranks whose place is not theirs any more, as its host was lost."""
        self._vacant: list[Place] = []
        """Of ``_group``."""
        self._unplaced: PlacementGroup | None = None
        """Reserved for a move that has not been told yet where it is."""

    @property
    def places(self) -> list[Place]:
        """Each rank's, or the one that it had."""
        return list(self._places)

    def lost(self) -> list[tuple[int, str]]:
        """Ranks whose host is gone, with the host. Raises ControlServiceSilent."""
        living = self._living()
        return [(rank, place.host) for rank, place in enumerate(self._places) if not self._stands(rank, living)]

    def has_room(self, rank: int) -> bool:
        """Whether the rank's host lives, or another one has room for it at this moment. Raises ControlServiceSilent."""
        living = self._living()
        if self._stands(rank, living):
            return True
        self._leave(rank)
        free = self._control.ask(available_resources_per_node)
        return any(place.lives(living) for place in self._vacant) or any(
            free.get(node_id, {}).get(self._device, 0.0) >= 1 for node_id in living
        )

    def find(self, rank: int) -> None:
        """Another place, where the host of the rank's own is gone. Raises NotReserved or ControlServiceSilent."""
        living = self._living()
        if self._stands(rank, living):
            return
        self._leave(rank)
        place = next((place for place in self._vacant if place.lives(living)), None)
        if place is None:
            place = self._reserve_anywhere()
        else:
            self._vacant.remove(place)
        former, self._places[rank] = self._places[rank], place
        self._homeless.discard(rank)
        _log.warning("replica %s: rank %d moves from %s to %s", self._name, rank, former.host, place.host)

    def release(self) -> None:
        """Give all places back."""
        moved = [p.group for r, p in enumerate(self._places) if p.node_id is not None and r not in self._homeless]
        unplaced = [] if self._unplaced is None else [self._unplaced]
        for group in [self._group, *moved, *unplaced]:
            remove_placement_group(group)

    def _stands(self, rank: int, living: dict[str, str]) -> bool:
        return rank not in self._homeless and self._places[rank].lives(living)

    def _leave(self, rank: int) -> None:
        """Whatever has become of the rank's place, it is not the rank's any more."""
        if rank in self._homeless:
            return
        place = self._places[rank]
        if place.node_id is None:
            self._vacant.append(place)
        else:
            self._control.ask(lambda: remove_placement_group(place.group))
        self._homeless.add(rank)

    def _reserve_anywhere(self) -> Place:
        group = self._unplaced = self._unplaced or self._reserve([{self._device: 1.0}], MOVE_TIMEOUT_S)
        node_id: str = self._control.ask(lambda: placement_group_table(group))["bundles_to_node_id"][0]
        host = self._living().get(node_id)
        if host is None:
            raise NotReserved(f"the place that replica {self._name} was given was lost with its host")
        self._unplaced = None
        return Place(group, 0, host, node_id)

    def _reserve(self, bundles: list[dict[str, float]], timeout_s: float) -> PlacementGroup:
        name = f"remuda-{self._name}-{uuid.uuid4().hex[:12]}"
        group = self._control.ask(lambda: placement_group(bundles, strategy="PACK", name=name))
        try:
            ray.get(group.ready(), timeout=timeout_s)
        except GetTimeoutError:
            remove_placement_group(group)
            raise NotReserved(
                f"Ray did not reserve {len(bundles)} × {self._device} for replica {self._name} within "
                f"{timeout_s:.0f} s; something else holds them, see ray status"
            ) from None
        return group

    def _living(self) -> dict[str, str]:
        """Node → its host's address. Raises ControlServiceSilent."""
        return {node["NodeID"]: node["NodeManagerAddress"] for node in self._control.ask(ray.nodes) if node["Alive"]}
