"""What a layout pays for the links between its ranks' hosts, from what was measured. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.doctor import check_links
from cluster.doctor.facts import LinkFacts
from cluster.doctor.finding import Finding
from cluster.plan.link_cost import expert_exchange_traffic, tensor_parallel_traffic
from cluster.plan.link_notices import DECODING_REQUESTS
from cluster.replica.events import ReplicaPlan
from engine.config import Dtype
from engine.executor.defaults import plans_in_flight
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class Placed:
    """The ranks of all gangs, numbered through. ``addresses``: each rank's. ``stage_s``: how long a stage takes for a
    decode step without links, in which each of its ranks reads its weights once."""

    plan: ReplicaPlan
    model: ModelConfig
    addresses: Sequence[str]
    links: Sequence[LinkFacts]
    stage_s: float

    @property
    def number_bytes(self) -> int:
        return Dtype(self.plan.dtype).num_bytes

    @property
    def step_s(self) -> float:
        """A token passes all stages, and what layers wait for is counted over all layers."""
        return self.plan.parallel.pp * self.stage_s

    def crossing(self, size: int) -> list[range]:
        """Of the runs of ``size`` ranks, those on several hosts."""
        runs = [range(first, first + size) for first in range(0, len(self.addresses), size)]
        return [run for run in runs if len({self.addresses[rank] for rank in run}) > 1]

    def most_on_a_host(self, groups: Sequence[range]) -> int:
        return max(max(Counter(self.addresses[rank] for rank in group).values()) for group in groups)


def check_layout_links(placed: Placed) -> Iterator[Finding]:
    """Tensor-parallel groups that cross hosts, stages whose ranks exchange tokens over hosts, and pipelines."""
    yield from _tensor_parallel(placed)
    yield from _exchanges(placed)
    yield from _stages(placed)


def _tensor_parallel(placed: Placed) -> Iterator[Finding]:
    tp = placed.plan.tensor_parallel_size
    if not (crossing := placed.crossing(tp)):
        return
    on_a_host = placed.most_on_a_host(crossing)
    traffic = tensor_parallel_traffic(placed.model, tp, on_a_host, DECODING_REQUESTS, placed.number_bytes)
    yield from check_links.check_tensor_parallel_link(crossing, placed.links, placed.addresses, traffic, placed.step_s)


def _exchanges(placed: Placed) -> Iterator[Finding]:
    parallel = placed.plan.parallel
    size = parallel.dp * parallel.tp
    if not placed.model.num_experts or not parallel.exchanges_tokens or not (crossing := placed.crossing(size)):
        return
    on_a_host = placed.most_on_a_host(crossing)
    traffic = expert_exchange_traffic(placed.model, size, on_a_host, DECODING_REQUESTS, placed.number_bytes)
    yield from check_links.check_exchange_link(crossing, placed.links, placed.addresses, traffic, placed.step_s)


def _stages(placed: Placed) -> Iterator[Finding]:
    parallel = placed.plan.parallel
    if parallel.pp == 1:
        return
    in_flight = plans_in_flight(placed.plan.device, parallel.pp)
    row_bytes = -(-DECODING_REQUESTS // in_flight) * placed.model.hidden_size * placed.number_bytes
    for first in range(0, len(placed.addresses), parallel.num_ranks):
        gang = range(first, first + parallel.num_ranks)
        yield from check_links.check_pipeline_links(
            gang, parallel.dp * parallel.tp, in_flight, placed.links, placed.addresses, row_bytes, placed.stage_s
        )
