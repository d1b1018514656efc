"""What the environment of a rank's process says, and what it is made to say."""

import os

from cluster.replica.fabric import collective_environment, network_interfaces, rdma_ports


def quiet_torch() -> None:
    """Before torch is imported: its store warns on the terminal whenever a formation's store ends before its ranks."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def choose_network(address: str) -> None:
    """Let NCCL in this process use the network on which others know this host as ``address``, unless it was told
    something else. gloo is given the address itself."""
    os.environ.update(collective_environment(address, network_interfaces(), rdma_ports(), os.environ))
