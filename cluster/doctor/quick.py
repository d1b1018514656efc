"""The quick part of the doctor, which ``remuda serve`` runs by itself between placing ranks and starting them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cluster.control.host_calls import HostCalls
from cluster.control.placement import HostInfo
from cluster.doctor import check_hosts, check_network
from cluster.doctor.ask_hosts import ask_clocks, ask_hosts
from cluster.doctor.facts import Clock, HostFacts
from cluster.doctor.finding import Finding, Level, of_level
from cluster.errors import StartFailed
from cluster.replica.events import MemoryPlanned, ReplicaPlan


def examine_quickly(
    calls: HostCalls, plan: ReplicaPlan, gangs: Sequence[Sequence[HostInfo]], planned: MemoryPlanned
) -> list[str]:
    """The hosts of all gangs' ranks. Returns warnings.

    Raises:
        StartFailed: something would not work; the message names host, value and remedy of the first, and the others.
    """
    hosts = list({host.node_id: host for gang in gangs for host in gang}.values())
    facts, findings = ask_hosts(calls, hosts, model=plan.model, revision=plan.revision, reads_disk=False)
    if facts:
        needed = bytes_needed(plan, gangs, planned.weight_bytes)
        findings += check_facts(facts, ask_clocks(calls, hosts), plan, gangs, needed)
    if failures := of_level(findings, Level.FAIL):
        others = "".join(f"; {finding.sentence()}" for finding in failures[1:])
        raise StartFailed(f"{failures[0].sentence()}{others}")
    return [finding.sentence() for finding in of_level(findings, Level.WARN)]


def bytes_needed(plan: ReplicaPlan, gangs: Sequence[Sequence[HostInfo]], weight_bytes: Sequence[int]) -> dict[str, int]:
    """By the CPU ranks of each address, at the very least: weights and caches. What libraries take besides is not
    certain, and nothing is refused for it."""
    needed: Counter[str] = Counter()
    for gang in gangs:
        for host, weights in zip(gang, weight_bytes, strict=True):
            needed[host.address] += weights + plan.kv_cache_memory_bytes
    return needed


def check_facts(
    facts: Sequence[HostFacts],
    clocks: Mapping[str, Clock],
    plan: ReplicaPlan,
    gangs: Sequence[Sequence[HostInfo]],
    needed: Mapping[str, int],
) -> list[Finding]:
    """Every check of hosts that needs no more than their facts."""
    on_gpus = plan.device == "cuda"
    num_ranks = Counter(host.address for gang in gangs for host in gang)
    ray_gpus = {host.address: host.num_gpus for gang in gangs for host in gang}
    ray_used = {host.address: host.used_gpus for gang in gangs for host in gang}
    checks: list[Iterable[Finding]] = [
        check_hosts.check_versions(facts),
        check_hosts.check_settings(facts),
        check_hosts.check_checkpoints(facts),
        check_hosts.check_gpu_memory(facts, num_ranks, ray_used, plan.gpu_memory_utilization)
        if on_gpus
        else check_hosts.check_memory(facts, needed),
        check_hosts.check_shm(facts, num_ranks, on_gpus=on_gpus),
        check_hosts.check_limits(facts),
        check_hosts.check_disks(facts),
        check_hosts.check_clocks(clocks),
        check_network.check_interfaces(facts),
        check_network.check_mtus(facts),
        check_network.check_adapters(facts),
        check_network.check_numa(facts, on_gpus=on_gpus),
        check_network.check_visible_devices(facts, ray_gpus) if on_gpus else (),
        check_network.check_equal_memory(facts, num_ranks) if on_gpus else (),
    ]
    return [finding for check in checks for finding in check]
