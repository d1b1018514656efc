"""Whether ranks run on GPUs, where ``--device auto`` leaves that to a cluster that is joined. Pure."""

from collections.abc import Sequence

import msgspec

from cluster.control.placement import HostInfo
from cluster.replica.events import LaunchConfig


def with_device(config: LaunchConfig, hosts: Sequence[HostInfo]) -> LaunchConfig:
    """``config`` for GPUs where any of ``hosts`` has one, in use or not; for CPUs where none has. What the user has
    named stays."""
    if config.on_gpus is None:
        return config
    has_gpus = any(host.num_gpus for host in hosts)
    return msgspec.structs.replace(config, replica=config.on_gpus if has_gpus else config.replica, on_gpus=None)
