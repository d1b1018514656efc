"""Which rank runs on which host. Pure: hosts in, ranks' hosts out; the same input gives the same answer.

Ranks are numbered as the mesh numbers them (engine/parallel/mesh.py): a tensor-parallel group is a run of tp ranks,
a pipeline stage a run of dp × tp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import ParallelConfig
from engine.errors import LayoutError


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
    """

    node_id: str
    address: str
    cpu_slots: int
    num_gpus: int = 0
    used_cpu_slots: int = 0
    used_gpus: int = 0

    def num_free(self, on_gpus: bool) -> int:
        """How many more ranks it can take."""
        return self.num_gpus - self.used_gpus if on_gpus else self.cpu_slots - self.used_cpu_slots


def place_gangs(
    parallel: ParallelConfig, hosts: Sequence[HostInfo], *, on_gpus: bool, num_gangs: int = 1
) -> list[list[HostInfo]]:
    """The host of every rank of every gang, by rank number.

    A gang that one host can hold goes onto the first host that can. Otherwise it goes onto as few hosts as filling
    the emptiest first gives; a tensor-parallel group stays on one host as long as any host can still take it whole,
    and is a run of neighbours on few hosts where none can.

    Args:
        on_gpus: a rank takes a GPU; otherwise a CPU slot.

    Raises:
        LayoutError: the free slots of all hosts do not suffice; the message counts them.
    """
    check_room(parallel, hosts, on_gpus, num_gangs)
    num_free = {host.node_id: max(0, host.num_free(on_gpus)) for host in hosts}
    return [place_gang(parallel, hosts, num_free) for _ in range(num_gangs)]


def check_room(parallel: ParallelConfig, hosts: Sequence[HostInfo], on_gpus: bool, num_gangs: int) -> None:
    """Raise LayoutError unless the free slots of all hosts hold all gangs."""
    num_needed = parallel.num_ranks * num_gangs
    num_free = sum(max(0, host.num_free(on_gpus)) for host in hosts)
    if num_needed <= num_free:
        return
    what, remedy = ("GPUs", "add hosts") if on_gpus else ("CPU slots", "raise --cpu-slots, add hosts")
    copies = f"{num_gangs} replicas × " if num_gangs > 1 else ""
    total = sum(host.num_gpus if on_gpus else host.cpu_slots for host in hosts)
    each = ", ".join(f"{host.address}: {host.num_free(on_gpus)}" for host in hosts) or "there are no hosts"
    raise LayoutError(
        f"{copies}pp {parallel.pp} × dp {parallel.dp} × tp {parallel.tp} needs {num_needed} {what}, but only "
        f"{num_free} of {total} are free ({each}); {remedy} or lower the degrees"
    )


def place_gang(parallel: ParallelConfig, hosts: Sequence[HostInfo], num_free: dict[str, int]) -> list[HostInfo]:
    """Hosts of one gang's ranks; takes their slots out of ``num_free`` (by node id), which must suffice."""
    for host in hosts:
        if num_free[host.node_id] >= parallel.num_ranks:
            num_free[host.node_id] -= parallel.num_ranks
            return [host] * parallel.num_ranks
    # The sort is stable: among equals the order of ``hosts`` decides.
    emptiest_first = sorted(hosts, key=lambda host: -num_free[host.node_id])
    placed: list[HostInfo] = []
    for _ in range(parallel.num_ranks // parallel.tp):
        placed += place_group(parallel.tp, emptiest_first, num_free)
    return placed


def place_group(tp: int, hosts: Sequence[HostInfo], num_free: dict[str, int]) -> list[HostInfo]:
    """Hosts of one tensor-parallel group; takes their slots out of ``num_free``."""
    for host in hosts:
        if num_free[host.node_id] >= tp:
            num_free[host.node_id] -= tp
            return [host] * tp
    group: list[HostInfo] = []
    # The roomiest first: the group then crosses as few borders between hosts as it can.
    for host in sorted(hosts, key=lambda host: -num_free[host.node_id]):
        num_taken = min(num_free[host.node_id], tp - len(group))
        num_free[host.node_id] -= num_taken
        group += [host] * num_taken
    assert len(group) == tp, "check_room has counted the slots"
    return group
