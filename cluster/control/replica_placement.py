"""Where the ranks of every replica go, in the supervisor's words. Pure."""

from collections.abc import Sequence

from cluster.control.placement import HostInfo, place_gangs
from cluster.replica.events import ReplicaPlan
from cluster.replica.placed_rank import PlacedRank
from engine.config import ParallelConfig


def place_replicas(plan: ReplicaPlan, num_replicas: int, hosts: Sequence[HostInfo]) -> list[list[PlacedRank]]:
    """The ranks of every replica, in order of rank. Raises LayoutError where there is no room."""
    parallel = ParallelConfig(
        tp=plan.tensor_parallel_size,
        pp=plan.pipeline_parallel_size,
        dp=plan.data_parallel_size,
        ep=plan.expert_parallel_size,
    )
    gangs = place_gangs(parallel, hosts, on_gpus=plan.device == "cuda", num_gangs=num_replicas)
    return [[PlacedRank(rank, host.address) for rank, host in enumerate(gang)] for gang in gangs]
