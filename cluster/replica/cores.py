"""Which cores a CPU rank runs on, where the host's memory is in several NUMA nodes: those of one node, so that its
weights and cache, which it allocates itself, stay near."""

from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.replica.fabric import SYS, numa_cores
from engine.executor.worker_config import WorkerConfig


def cores_of(index: int, num_ranks: int, nodes: Sequence[Sequence[int]], allowed: Sequence[int]) -> list[int]:
    """The cores of one of a gang's ranks on a host; [] where it is left to the kernel.

    Neighbours share a node, and every node gets as many ranks. Fewer ranks than nodes are left alone: several small
    gangs would all be put on the first nodes.

    Args:
        index: of the rank among the gang's ``num_ranks`` on this host.
        nodes: the cores of each NUMA node.
        allowed: those that this process may use.
    """
    usable = [cores for node in nodes if (cores := sorted(set(node) & set(allowed)))]
    if not 1 < len(usable) <= num_ranks:
        return []
    return usable[index * len(usable) // num_ranks]


def bind_to_cores(config: WorkerConfig, sys: Path = SYS) -> None:
    """This process, which is the rank; threads that it starts from now on are bound, too."""
    if config.device != "cpu" or config.rank not in config.host_ranks:
        return
    process = psutil.Process()
    index, num_ranks = config.host_ranks.index(config.rank), len(config.host_ranks)
    if cores := cores_of(index, num_ranks, numa_cores(sys), process.cpu_affinity() or []):
        process.cpu_affinity(cores)
