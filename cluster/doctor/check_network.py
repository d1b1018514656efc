"""Checks of each host's network interfaces, RDMA adapters and devices. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from cluster.doctor.facts import HostFacts, RankFacts
from cluster.doctor.finding import Finding, Level
from cluster.replica.fabric import Hca, collective_environment

SLOW_DEVICE, UNUSABLE_DEVICE = 0.8, 0.4
"""A rank whose device is so much slower than the gang's fastest is priced; so much slower, refused."""
_ALL_VISIBLE = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def chosen_environment(host: HostFacts) -> dict[str, str]:
    return collective_environment(host.address, host.nics, host.hcas, host.settings)


def check_interfaces(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """The interface of the address that the cluster uses; another that is faster; a variable that names none."""
    for host in hosts:
        carrier = next((nic for nic in host.nics if host.address in nic.addresses), None)
        if carrier is None:
            there = ", ".join(f"{nic.name} {' '.join(nic.addresses)}" for nic in host.nics)
            yield Finding("interface", host.address, Level.FAIL, f"none carries it; there are: {there}", "",
                          "start Ray there with --node-ip-address set to an address of that host")  # fmt: skip
            continue
        names = {nic.name for nic in host.nics}
        told = host.settings.get("GLOO_SOCKET_IFNAME", carrier.name)
        if told not in names:
            yield Finding("interface", host.address, Level.FAIL, f"GLOO_SOCKET_IFNAME={told} is not there", "",
                          f"unset it before Ray is started, or set it to {carrier.name}")  # fmt: skip
            continue
        own = carrier.mbit_per_s or 0
        faster = [nic for nic in host.nics if nic.is_physical and nic.addresses and (nic.mbit_per_s or 0) > own]
        if own and faster:
            best = max(faster, key=lambda nic: nic.mbit_per_s or 0)
            remedy = f"start Ray there with --node-ip-address={best.addresses[0]}, and on the other hosts alike"
            yield Finding("interface", host.address, Level.WARN, f"{carrier.name} at {own:,} Mbit/s",
                          f"{best.name} has {best.mbit_per_s:,}", remedy)  # fmt: skip
            continue
        speed = f" at {own:,} Mbit/s" if own else ""
        yield Finding("interface", host.address, Level.OK, f"{carrier.name}{speed}, MTU {carrier.mtu}")


def check_mtus(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Frames larger than a peer takes are dropped without a word."""
    mtus = {host.address: nic.mtu for host in hosts for nic in host.nics if host.address in nic.addresses}
    usual = Counter(mtus.values()).most_common(1)[0][0] if mtus else 0
    for address, mtu in mtus.items():
        if mtu != usual:
            yield Finding("MTU", address, Level.WARN, str(mtu), f"elsewhere {usual}", f"ip link set mtu {usual}")


def check_adapters(hosts: Sequence[HostFacts]) -> Iterator[Finding]:
    """RDMA ports: the same on all hosts, and near the GPUs."""
    if not any(host.hcas for host in hosts):
        return
    usual = Counter(_ports(host) for host in hosts).most_common(1)[0][0]
    for host in hosts:
        ports = _ports(host)
        if host.settings.get("NCCL_IB_DISABLE", "0") not in ("0", "") and ports:
            yield Finding("RDMA", host.address, Level.WARN, f"{ports} switched off by NCCL_IB_DISABLE", "", "unset it")
        elif ports != usual:
            yield Finding("RDMA", host.address, Level.FAIL, ports or "no active port", f"elsewhere {usual}",
                          "bring the missing links up (ibstat), or set NCCL_IB_DISABLE=1 everywhere")  # fmt: skip
        else:
            yield Finding("RDMA", host.address, Level.OK, f"{ports}: {chosen_environment(host).get('NCCL_IB_HCA')}")


def _ports(host: HostFacts) -> str:
    """Active ports by rate and kind, as in ``8 × 400 Gbit/s InfiniBand``."""

    def kind(port: Hca) -> str:
        return f"{port.gbit_per_s:g} Gbit/s {port.link_layer}"

    counts = Counter(kind(port) for port in host.hcas if port.is_active)
    return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))


def check_numa(hosts: Sequence[HostFacts], *, on_gpus: bool) -> Iterator[Finding]:
    """GPUs far from every adapter that is used; CPU ranks on a host with several memories."""
    for host in hosts:
        adapters = {port.numa_node for port in host.hcas if port.is_active and port.numa_node is not None}
        far = [index for index, gpu in enumerate(host.gpus) if gpu.numa_node is not None and adapters
               and gpu.numa_node not in adapters]  # fmt: skip
        nodes = f"{host.num_numa_nodes} NUMA nodes" if host.num_numa_nodes > 1 else "1 NUMA node"
        if on_gpus and far:
            which = ", ".join(map(str, far))
            yield Finding("NUMA", host.address, Level.WARN, f"GPUs {which} have no adapter on their NUMA node",
                          f"adapters are on {', '.join(map(str, sorted(adapters)))}",
                          "bring the adapters of the other nodes up, or use the near GPUs only")  # fmt: skip
        elif not on_gpus and host.num_numa_nodes > 1:
            yield Finding("NUMA", host.address, Level.WARN, f"{nodes}; a gang with fewer ranks there runs on any", "",
                          "start Ray there under numactl --interleave=all")  # fmt: skip
        else:
            yield Finding("NUMA", host.address, Level.OK, nodes)


def check_visible_devices(hosts: Sequence[HostFacts], ray_gpus: Mapping[str, int]) -> Iterator[Finding]:
    """``ray_gpus``: how many GPUs Ray has on each address; the driver may list more, for CUDA_VISIBLE_DEVICES hid them
    when Ray was started."""
    for host in hosts:
        known = ray_gpus.get(host.address, 0)
        if not host.gpus and not known:
            continue
        if host.settings.get(_ALL_VISIBLE, "0") not in ("0", ""):
            yield Finding("devices", host.address, Level.FAIL, f"{_ALL_VISIBLE} is set: all ranks would take GPU 0", "",
                          "unset it before Ray is started")  # fmt: skip
        elif known != len(host.gpus):
            yield Finding("devices", host.address, Level.WARN, f"Ray has {known} of {len(host.gpus)} GPUs", "",
                          "unset CUDA_VISIBLE_DEVICES before Ray is started, if all are meant")  # fmt: skip
        else:
            kinds = Counter(gpu.name for gpu in host.gpus)
            told = ", ".join(f"{count} × {name}" for name, count in kinds.items())
            yield Finding("devices", host.address, Level.OK, told)


def check_equal_memory(hosts: Sequence[HostFacts], num_ranks: Mapping[str, int]) -> Iterator[Finding]:
    """All ranks of a gang get as much as its smallest GPU has: what larger ones have beyond that lies idle. Where
    ``num_ranks`` leave GPUs of an address over, the unequal ones may be those, so it is not refused."""
    sizes = [gpu.total_bytes for host in hosts for gpu in host.gpus]
    names = {gpu.name for host in hosts for gpu in host.gpus}
    if not sizes or len(names) == 1:
        return
    all_taken = all(num_ranks.get(host.address, 0) == len(host.gpus) for host in hosts)
    for host in hosts:
        idle = sum(gpu.total_bytes - min(sizes) for gpu in host.gpus)
        largest = max((gpu.total_bytes for gpu in host.gpus), default=0)
        kinds = ", ".join(sorted({gpu.name for gpu in host.gpus}))
        if idle:
            level = Level.FAIL if all_taken and min(sizes) < UNUSABLE_DEVICE * largest else Level.WARN
            yield Finding("equal devices", host.address, level, f"{kinds}: {idle / 2**30:,.0f} GiB would lie idle",
                          f"the gang's smallest GPU has {min(sizes) / 2**30:,.0f} GiB",
                          "make gangs of equal GPUs: one Ray cluster for each kind")  # fmt: skip


def check_equal_speed(ranks: Sequence[RankFacts], hosts: Sequence[str]) -> Iterator[Finding]:
    """A step ends when the slowest rank has: what that costs. CPU ranks that share cores differ by chance, so only GPUs
    are refused. ``hosts``: each rank's address."""
    fastest = max(rank.bytes_per_s for rank in ranks)
    for rank in ranks:
        share = rank.bytes_per_s / fastest
        level = Level.OK if share >= SLOW_DEVICE else Level.WARN
        if share < UNUSABLE_DEVICE and rank.device != "cpu":
            level = Level.FAIL
        value = f"{rank.device} reads {rank.bytes_per_s / 1e9:,.1f} GB/s"
        remedy = ""
        if level is not Level.OK:
            value += f": the gang's faster ranks lose up to {1 - share:.0%} of their speed"
            remedy = "end what else runs there, or leave this device out of the gang"
        where = f"rank {rank.rank} ({hosts[rank.rank]})"
        yield Finding("device speed", where, level, value, f"the gang's fastest {fastest / 1e9:,.1f} GB/s", remedy)
