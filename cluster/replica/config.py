"""What the environment of a rank's process says, and what it is made to say."""

import os

from cluster.replica.fabric import collective_environment, network_interfaces, rdma_ports


def choose_network(address: str) -> None:
    """Let NCCL in this process use the network on which others know this host as ``address``, unless it was told
    something else. gloo is given the address itself."""
    os.environ.update(collective_environment(address, network_interfaces(), rdma_ports(), os.environ))
