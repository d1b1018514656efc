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
from cluster.doctor.host_links import measure_host_links
from cluster.doctor.quick import bytes_needed, check_facts
from cluster.plan.link_cost import expert_exchange_traffic, tensor_parallel_traffic
from cluster.plan.link_notices import DECODING_REQUESTS
from cluster.replica.events import LaunchConfig, ReplicaPlan
from engine.config import Dtype
from engine.executor.defaults import plans_in_flight
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class Examination:
    """``rank_hosts``: each rank's address."""

    hosts: Sequence[HostFacts]
    rank_hosts: Sequence[str]
    ranks: Sequence[RankFacts]
    links: Sequence[LinkFacts]
    findings: Sequence[Finding]

    @property
    def is_well(self) -> bool:
        return all(finding.level is not Level.FAIL for finding in self.findings)


def examine(calls: HostCalls, launch: LaunchConfig, model: ModelConfig | None) -> Examination:
    """Of the hosts of the launch's gangs, or of all hosts where no ``model`` is given.

    Raises LayoutError where the ranks have no room, DoesNotFit where this host's memory is too small.
    """
    plan = launch.replica
    on_gpus = plan.device == "cuda"
    needed: dict[str, int] = {}
    to_read: Counter[str] = Counter()
    weights: list[int] = []
    if model is None:
        placed = everywhere(calls.nodes(), on_gpus=on_gpus)
        gangs = [placed]
    else:
        gangs, _ = place_nearby(calls, launch, measure_host_links)
        placed = gangs[0]
        num_local = sum(host.address == calls.host for gang in gangs for host in gang)
        weights = plan_memory(plan, num_local).weight_bytes
        needed = bytes_needed(plan, gangs, weights)
        for host, num_bytes in zip(placed, weights, strict=True):
            to_read[host.address] += num_bytes
    hosts = list({host.node_id: host for gang in gangs for host in gang}.values())
    asked = None if model is None else plan.model
    facts, findings = ask_hosts(calls, hosts, model=asked, revision=plan.revision, reads_disk=True)
    if facts:
        findings += check_facts(facts, ask_clocks(calls, hosts), plan, gangs, needed)
        findings += check_hosts.check_read_rates(facts, to_read)
    addresses = [host.address for host in placed]
    ranks, links = ask_ranks(calls, placed, on_gpus=on_gpus)
    if ranks:
        findings += check_network.check_equal_speed(ranks, addresses)
    findings += check_links.check_links(links, addresses)
    if model is not None and ranks:
        step_s = max(weights) / min(rank.bytes_per_s for rank in ranks)
        findings += _tensor_parallel(plan, model, addresses, step_s, links)
        findings += _exchanges(plan, model, addresses, step_s, links)
        findings += _stages(plan, model, addresses, step_s, links)
    return Examination(facts, addresses, ranks, links, findings)


def everywhere(hosts: Sequence[HostInfo], *, on_gpus: bool) -> list[HostInfo]:
    """A rank for every free GPU, or one on every host."""
    return [host for host in hosts for _ in range(host.num_free(True) if on_gpus else 1)]


def _tensor_parallel(
    plan: ReplicaPlan,
    model: ModelConfig,
    addresses: Sequence[str],
    step_s: float,
    links: Sequence[LinkFacts],
) -> list[Finding]:
    tp = plan.tensor_parallel_size
    groups = [range(first, first + tp) for first in range(0, len(addresses), tp)]
    crossing = _crossing(groups, addresses)
    if not crossing:
        return []
    number_bytes = Dtype(plan.dtype).num_bytes
    traffic = tensor_parallel_traffic(model, tp, _most_on_a_host(crossing, addresses), DECODING_REQUESTS, number_bytes)
    return list(check_links.check_tensor_parallel_link(crossing, links, addresses, traffic, step_s))


def _exchanges(
    plan: ReplicaPlan, model: ModelConfig, addresses: Sequence[str], step_s: float, links: Sequence[LinkFacts]
) -> list[Finding]:
    parallel = plan.parallel
    if not model.num_experts or not parallel.exchanges_tokens:
        return []
    size = parallel.dp * parallel.tp
    crossing = _crossing([range(first, first + size) for first in range(0, len(addresses), size)], addresses)
    if not crossing:
        return []
    number_bytes = Dtype(plan.dtype).num_bytes
    on_a_host = _most_on_a_host(crossing, addresses)
    traffic = expert_exchange_traffic(model, size, on_a_host, DECODING_REQUESTS, number_bytes)
    return list(check_links.check_exchange_link(crossing, links, addresses, traffic, step_s))


def _stages(
    plan: ReplicaPlan, model: ModelConfig, addresses: Sequence[str], step_s: float, links: Sequence[LinkFacts]
) -> list[Finding]:
    parallel = plan.parallel
    if parallel.pp == 1:
        return []
    in_flight = plans_in_flight(plan.device, parallel.pp)
    row_bytes = -(-DECODING_REQUESTS // in_flight) * model.hidden_size * Dtype(plan.dtype).num_bytes
    size = parallel.dp * parallel.tp
    return list(check_links.check_pipeline_links(size, in_flight, links, addresses, row_bytes, step_s))


def _crossing(groups: Sequence[range], addresses: Sequence[str]) -> list[range]:
    return [group for group in groups if len({addresses[rank] for rank in group}) > 1]


def _most_on_a_host(groups: Sequence[range], addresses: Sequence[str]) -> int:
    return max(max(Counter(addresses[rank] for rank in group).values()) for group in groups)
