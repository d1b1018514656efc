"""Which rank runs on which host. Pure: hosts in, ranks' hosts out; the same input gives the same answer.

Ranks are numbered as the mesh numbers them (engine/parallel/mesh.py): a tensor-parallel group is a run of tp ranks,
a pipeline stage a run of dp × tp.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.config import ParallelConfig
from engine.errors import LayoutError

Links = Mapping[tuple[str, str], float]
"""Measured seconds from one node id to another. A pair that is not there is farther than any."""
_NOBODY: Mapping[int, "HostInfo"] = {}


@dataclass(frozen=True)
class HostInfo:
    """One host of the cluster, as placement sees it.

    Attributes:
        node_id: Ray's id of the host's node.
        address: the IP address other hosts reach it under.
        cpu_slots: how many CPU ranks may run on it (one thread each), in use or not.
        num_gpus: how many GPUs it has, in use or not.
        used_cpu_slots: how many CPU slots something else holds.
        used_gpus: how many GPUs something else holds.
        topology: where it stands, from the widest to the narrowest, as in ("zone-a", "rack-3").
    """

    node_id: str
    address: str
    cpu_slots: int
    num_gpus: int = 0
    used_cpu_slots: int = 0
    used_gpus: int = 0
    topology: tuple[str, ...] = ()

    def num_free(self, on_gpus: bool) -> int:
        """How many more ranks it can take."""
        return self.num_gpus - self.used_gpus if on_gpus else self.cpu_slots - self.used_cpu_slots


def distance(one: HostInfo, other: HostInfo, links: Links | None = None) -> float:
    """0 within a host. Otherwise measured seconds, the slower way; where nothing was measured, 1 plus the number of
    topology levels in which two hosts differ."""
    if one.node_id == other.node_id:
        return 0.0
    if links is not None:
        ways = ((one.node_id, other.node_id), (other.node_id, one.node_id))
        return max(links.get(way, math.inf) for way in ways)
    levels = list(itertools.zip_longest(one.topology, other.topology))
    num_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], levels))
    return 1.0 + len(levels) - num_shared


def place_gangs(
    parallel: ParallelConfig,
    hosts: Sequence[HostInfo],
    *,
    on_gpus: bool,
    num_gangs: int = 1,
    tp_across_hosts: bool = False,
    links: Links | None = None,
) -> list[list[HostInfo]]:
    """The host of every rank of every gang, by rank number.

    A gang that one host can hold goes onto the first host that can. Otherwise it goes onto as few hosts as can be, for
    each more is one more that can fail, and among those so that hosts of one stage are near each other, and then
    neighbouring pipeline stages. A stage stays on one host as long as a host can take it whole, a tensor-parallel group
    always does.

    Args:
        on_gpus: a rank takes a GPU; otherwise a CPU slot.
        tp_across_hosts: a group that no host can take whole may be cut, into runs of neighbours on few hosts.

    Raises:
        LayoutError: the free slots of all hosts do not suffice, or only cut groups would fit; the message counts them.
    """
    check_room(parallel, hosts, on_gpus, num_gangs, tp_across_hosts)
    cluster = _Cluster(hosts, {host.node_id: max(0, host.num_free(on_gpus)) for host in hosts}, links)
    return [cluster.place_gang(parallel) for _ in range(num_gangs)]


def place_again(
    parallel: ParallelConfig,
    hosts: Sequence[HostInfo],
    kept: Mapping[int, HostInfo],
    *,
    on_gpus: bool,
    tp_across_hosts: bool = False,
    links: Links | None = None,
) -> dict[int, HostInfo]:
    """The hosts of one gang's ranks that have none any more, by the rules of place_gangs; the others stay.

    A stage that has ranks left is completed near them, on one host if one can take all that it lacks.

    Args:
        hosts: what is free there, beside the ranks that stay.
        kept: the hosts of those, among ``hosts``.

    Raises:
        LayoutError: there is no room, or only cut groups would fit; the message counts the slots.
    """
    num_needed = parallel.num_ranks - len(kept)
    free = {host.node_id: max(0, host.num_free(on_gpus)) for host in hosts}
    each = ", ".join(f"{host.address}: {free[host.node_id]}" for host in hosts) or "there are no hosts"
    if num_needed > sum(free.values()):
        raise LayoutError(f"{num_needed} ranks have no host, and only {sum(free.values())} slots are free ({each})")
    gang = _Cluster(hosts, free, links).place_gang(parallel, kept)
    groups = [gang[first : first + parallel.tp] for first in range(0, len(gang), parallel.tp)]
    if not tp_across_hosts and any(len({host.node_id for host in group}) > 1 for group in groups):
        raise LayoutError(
            f"{num_needed} ranks have no host, and no host has room for a whole group of {parallel.tp} ({each})"
        )
    return {rank: host for rank, host in enumerate(gang) if rank not in kept}


def may_choose_by_links(gangs: Sequence[Sequence[HostInfo]], hosts: Sequence[HostInfo], *, on_gpus: bool) -> bool:
    """Whether measured links could lead to another placement than ``gangs``: one of them is on several hosts, of which
    there are more than two to choose from, and labels do not tell these apart: some have none, or all stand in the same
    place (a zone, as clouds say it, holds both near hosts and far ones)."""
    free = [host for host in hosts if host.num_free(on_gpus) > 0]
    is_spread = any(len({host.node_id for host in gang}) > 1 for gang in gangs)
    are_told_apart = all(host.topology for host in free) and len({host.topology for host in free}) > 1
    return is_spread and len(free) > 2 and not are_told_apart


def check_room(
    parallel: ParallelConfig, hosts: Sequence[HostInfo], on_gpus: bool, num_gangs: int, tp_across_hosts: bool
) -> None:
    """Raise LayoutError unless the free slots of all hosts hold all gangs."""
    num_needed = parallel.num_ranks * num_gangs
    free = [max(0, host.num_free(on_gpus)) for host in hosts]
    what, remedy = ("GPUs", "add hosts") if on_gpus else ("CPU slots", "raise --cpu-slots, add hosts")
    copies = f"{num_gangs} replicas × " if num_gangs > 1 else ""
    layout = f"{copies}pp {parallel.pp} × dp {parallel.dp} × tp {parallel.tp}"
    each = ", ".join(f"{host.address}: {host.num_free(on_gpus)}" for host in hosts) or "there are no hosts"
    if num_needed > sum(free):
        total = sum(host.num_gpus if on_gpus else host.cpu_slots for host in hosts)
        raise LayoutError(
            f"{layout} needs {num_needed} {what}, but only {sum(free)} of {total} are free ({each}); {remedy} or lower "
            f"the degrees"
        )
    num_whole = sum(slots // parallel.tp for slots in free)
    if num_whole * parallel.tp < num_needed and not tp_across_hosts:
        raise LayoutError(
            f"{layout} needs {num_needed // parallel.tp} groups of {parallel.tp} {what} on one host each, but there is "
            f"room for {num_whole} only ({each}); lower --tp and raise --pp, or give --tp-across-hosts where the links "
            f"between hosts are as fast as those within"
        )


class _Cluster:
    """Hosts and what is free on them while gangs are placed."""

    def __init__(self, hosts: Sequence[HostInfo], num_free: dict[str, int], links: Links | None) -> None:
        self._hosts = hosts
        self._num_free = num_free
        self._links = links

    def place_gang(self, parallel: ParallelConfig, kept: Mapping[int, HostInfo] = _NOBODY) -> list[HostInfo]:
        """``kept``: ranks that have their hosts already."""
        for host in () if kept else self._hosts:
            if self._num_free[host.node_id] >= parallel.num_ranks:
                self._num_free[host.node_id] -= parallel.num_ranks
                return [host] * parallel.num_ranks
        tried = [self._place_from(seed, parallel, kept) for seed in self._hosts]
        # The first of equals, so the order of hosts decides.
        placed, self._num_free = min(tried, key=lambda found: self._cost(found[0], parallel))
        return placed

    def _place_from(
        self, seed: HostInfo, parallel: ParallelConfig, kept: Mapping[int, HostInfo]
    ) -> tuple[list[HostInfo], dict[str, int]]:
        """Each stage as near to the one before as it can be, the first to ``seed``; and what is free then."""
        tried = _Cluster(self._hosts, dict(self._num_free), self._links)
        placed: list[HostInfo] = []
        stage_size = parallel.dp * parallel.tp
        for first in range(0, parallel.num_ranks, stage_size):
            stage = [kept.get(rank) for rank in range(first, first + stage_size)]
            placed += tried._complete_stage(placed[-1] if placed else seed, stage, parallel.tp)
        return placed, tried._num_free

    def _complete_stage(self, last: HostInfo, stage: list[HostInfo | None], tp: int) -> list[HostInfo]:
        """``stage``: each rank's host, None where it has none yet. Near those that it has, else near ``last``."""
        near = next(filter(None, stage), last)
        if together := self._take_near(near, stage.count(None)):
            return _filled(stage, together)
        placed: list[HostInfo] = []
        for first in range(0, len(stage), tp):
            group = stage[first : first + tp]
            near, num_missing = next(filter(None, group), near), group.count(None)
            placed += _filled(group, self._take_near(near, num_missing) or self._take_cut(near, num_missing))
            near = placed[-1]
        return placed

    def _take_near(self, last: HostInfo, num_ranks: int) -> list[HostInfo]:
        """So many slots of the nearest host that has them, of those the one with the most; [] where there is none."""
        fitting = [host for host in self._hosts if self._num_free[host.node_id] >= num_ranks]
        if not fitting:
            return []
        host = min(fitting, key=lambda host: (distance(last, host, self._links), -self._num_free[host.node_id]))
        self._num_free[host.node_id] -= num_ranks
        return [host] * num_ranks

    def _take_cut(self, last: HostInfo, num_ranks: int) -> list[HostInfo]:
        """Ranks of one group, over several hosts. The roomiest first: the group then crosses as few borders between
        hosts as it can; of equals the nearest."""
        group: list[HostInfo] = []
        by_room = sorted(self._hosts, key=lambda host: distance(last, host, self._links))
        for host in sorted(by_room, key=lambda host: -self._num_free[host.node_id]):
            num_taken = min(self._num_free[host.node_id], num_ranks - len(group))
            self._num_free[host.node_id] -= num_taken
            group += [host] * num_taken
        assert len(group) == num_ranks, "the slots were counted before"
        return group

    def _cost(self, placed: list[HostInfo], parallel: ParallelConfig) -> tuple[int, float, float]:
        """Hosts; how far those of one stage are apart, whose every layer waits for the slowest link; and how far
        neighbouring stages' ranks are."""
        stage_size = parallel.dp * parallel.tp
        stages = [placed[first : first + stage_size] for first in range(0, len(placed), stage_size)]
        within = sum(self._width(stage) for stage in stages)
        apart = sum(distance(a, b, self._links) for a, b in zip(placed, placed[stage_size:], strict=False))
        return len({host.node_id for host in placed}), within, apart

    def _width(self, stage: list[HostInfo]) -> float:
        hosts = {host.node_id: host for host in stage}.values()
        return max((distance(a, b, self._links) for a, b in itertools.combinations(hosts, 2)), default=0.0)


def _filled(places: Sequence[HostInfo | None], hosts: Sequence[HostInfo]) -> list[HostInfo]:
    """``hosts``: for the places that have none, in order."""
    left = iter(hosts)
    return [place or next(left) for place in places]
