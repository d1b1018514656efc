"""Where ranks go whose hosts were lost: by the rules of the first placement, on the hosts as Ray has them then."""

from collections.abc import Mapping
from dataclasses import replace

from cluster.control.placement import HostInfo, Links, place_again
from cluster.control.ray_runtime import living_hosts
from cluster.replica.events import LaunchConfig
from cluster.replica.reservations import ChooseHosts
from engine.errors import LayoutError


def measured_links(config: LaunchConfig) -> Links | None:
    return None if config.links is None else {(one, other): seconds for one, other, seconds in config.links}


def next_hosts(config: LaunchConfig, this_host: str) -> ChooseHosts:
    """For the supervisor of a gang of ``config`` on ``this_host``."""

    def choose(kept: Mapping[int, str], held: Mapping[str, int]) -> dict[int, str]:
        return choose_hosts(config, [with_held(host, held) for host in living_hosts(this_host)], kept)

    return choose


def with_held(host: HostInfo, held: Mapping[str, int]) -> HostInfo:
    """``held``: how many of the slots in use on each address are held for the ranks that are to be placed."""
    num_held = held.get(host.address, 0)
    return replace(
        host,
        used_cpu_slots=max(0, host.used_cpu_slots - num_held),
        used_gpus=max(0, host.used_gpus - num_held),
    )


def choose_hosts(config: LaunchConfig, hosts: list[HostInfo], kept: Mapping[int, str]) -> dict[int, str]:
    """Pure: see ChooseHosts."""
    by_address = {host.address: host for host in hosts}
    if gone := set(kept.values()) - by_address.keys():
        raise LayoutError(f"{', '.join(sorted(gone))} was lost too")
    placed = place_again(
        config.replica.parallel,
        hosts,
        {rank: by_address[address] for rank, address in kept.items()},
        on_gpus=config.replica.device == "cuda",
        tp_across_hosts=config.tp_across_hosts,
        links=measured_links(config),
    )
    return {rank: host.address for rank, host in placed.items()}
