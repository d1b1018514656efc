"""Placement of gangs on a cluster's hosts as it finds them, by measured links where these may decide."""

from collections.abc import Callable, Sequence

import msgspec

from cluster.control.host_calls import HostCalls
from cluster.control.placement import HostInfo, Links, may_choose_by_links, place_gangs
from cluster.replica.events import LaunchConfig

MeasureLinks = Callable[[HostCalls, Sequence[HostInfo]], Links]
"""How far given hosts are from each other."""


def place_nearby(
    calls: HostCalls, config: LaunchConfig, measure: MeasureLinks | None
) -> tuple[list[list[HostInfo]], LaunchConfig]:
    """The hosts of every gang's ranks, and ``config`` with what was measured: only where it may decide, for it takes
    seconds. Raises LayoutError."""
    on_gpus = config.replica.device == "cuda"
    hosts = calls.nodes()

    def placed(links: Links | None) -> list[list[HostInfo]]:
        return place_gangs(
            config.replica.parallel,
            hosts,
            on_gpus=on_gpus,
            num_gangs=config.num_replicas,
            tp_across_hosts=config.tp_across_hosts,
            links=links,
        )

    gangs = placed(None)
    if measure is None or not may_choose_by_links(gangs, hosts, on_gpus=on_gpus):
        return gangs, config
    links = measure(calls, [host for host in hosts if host.num_free(on_gpus) > 0])
    told = tuple((one, other, seconds) for (one, other), seconds in links.items())
    return placed(links), msgspec.structs.replace(config, links=told)
