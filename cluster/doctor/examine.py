"""The whole examination: every host, every link, and what the layout would pay for them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.control.host_calls import HostCalls
from cluster.control.memory import plan_memory
from cluster.control.nearby import place_nearby
from cluster.control.placement import HostInfo
from cluster.doctor import check_hosts, check_links, check_network
from cluster.doctor.ask_hosts import ask_clocks, ask_hosts
from cluster.doctor.ask_ranks import ask_ranks
from cluster.doctor.facts import HostFacts, LinkFacts, RankFacts
from cluster.doctor.finding import Finding, Level
from cluster.doctor.follow_rounds import Tell
from cluster.doctor.host_links import measure_host_links
from cluster.doctor.layout_cost import Placed, check_layout_links
from cluster.doctor.quick import bytes_needed, check_facts
from cluster.replica.events import LaunchConfig
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class Examination:
    """``rank_hosts``: each rank's address; ranks are numbered through all gangs, each of which has ``gang_size``."""

    hosts: Sequence[HostFacts]
    rank_hosts: Sequence[str]
    gang_size: int
    ranks: Sequence[RankFacts]
    links: Sequence[LinkFacts]
    findings: Sequence[Finding]

    @property
    def is_well(self) -> bool:
        return all(finding.level is not Level.FAIL for finding in self.findings)


def examine(calls: HostCalls, launch: LaunchConfig, model: ModelConfig | None, tell: Tell | None = None) -> Examination:
    """Of the hosts of the launch's gangs, or of all hosts where no ``model`` is given. ``tell`` hears how far the
    measurement of links is.

    Raises LayoutError where the ranks have no room, DoesNotFit where this host's memory is too small.
    """
    plan = launch.replica
    on_gpus = plan.device == "cuda"
    needed: dict[str, int] = {}
    to_read: Counter[str] = Counter()
    weights: list[int] = []
    if model is None:
        gangs = [everywhere(calls.nodes(), on_gpus=on_gpus)]
    else:
        gangs, _ = place_nearby(calls, launch, measure_host_links)
        num_local = sum(host.address == calls.host for gang in gangs for host in gang)
        weights = plan_memory(plan, num_local).weight_bytes
        needed = bytes_needed(plan, gangs, weights)
        for gang in gangs:
            for host, num_bytes in zip(gang, weights, strict=True):
                to_read[host.address] += num_bytes
    hosts = list({host.node_id: host for gang in gangs for host in gang}.values())
    asked = None if model is None else plan.model
    facts, findings = ask_hosts(calls, hosts, model=asked, revision=plan.revision, reads_disk=True)
    if facts:
        findings += check_facts(facts, ask_clocks(calls, hosts), plan, gangs, needed)
        findings += check_hosts.check_read_rates(facts, to_read)
    addresses = [host.address for gang in gangs for host in gang]
    ranks, links = ask_ranks(calls, gangs, on_gpus=on_gpus, tell=tell)
    gang_size = len(gangs[0])
    for first in range(0, len(addresses), gang_size or 1):
        if gang_ranks := [rank for rank in ranks if first <= rank.rank < first + gang_size]:
            findings += check_network.check_equal_speed(gang_ranks, addresses)
    findings += check_links.check_links(links, addresses)
    if model is not None and ranks:
        stage_s = max(weights) / min(rank.bytes_per_s for rank in ranks)
        findings += check_layout_links(Placed(plan, model, addresses, links, stage_s))
    return Examination(facts, addresses, gang_size, ranks, links, findings)


def everywhere(hosts: Sequence[HostInfo], *, on_gpus: bool) -> list[HostInfo]:
    """A rank for every free GPU, or one on every host."""
    return [host for host in hosts for _ in range(host.num_free(True) if on_gpus else 1)]
