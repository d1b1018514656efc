"""What a layout loses to its links: the doctor's numbers, from what was measured, are those that plan predicts."""

import itertools
import re

import pytest

from cluster.config import load_serve_config
from cluster.control.preflight import preflight
from cluster.doctor.facts import LinkFacts
from cluster.doctor.layout_cost import Placed, check_layout_links
from cluster.plan.devices import GIB, Machines, cpu
from cluster.plan.layout_plan import plan_layout
from cluster.plan.link_cost import Link
from cluster.plan.link_notices import link_notices
from cluster.plan.rank_memory import PlanOptions, weights_by_rank
from engine.config import Dtype
from engine.models.shapes.registry import served_shapes

PER_HOST = 2


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        {"data_parallel_size": 4, "expert_parallel_size": 4, "pipeline_parallel_size": 2},
        {"data_parallel_size": 4, "expert_parallel_size": 4},
    ],
    ids=str,
)
def test_plan_and_doctor_give_the_same_number(degrees: dict[str, int]) -> None:
    checked = preflight(load_serve_config({**degrees, "device": "cpu", "dtype": "float32"}))
    plan, model = checked.launch.replica, checked.model
    shapes, parallel = served_shapes(model), plan.parallel
    machines = Machines(cpu("cpu", 8 * GIB), parallel.num_ranks // PER_HOST, PER_HOST)
    options = PlanOptions(Dtype.FLOAT32, max_num_seqs=8, max_num_batched_tokens=512)
    laid_out = plan_layout(shapes, parallel, machines, options, weights_by_rank(shapes, parallel, options))
    stage_s = max(rank.weight_bytes for rank in laid_out.ranks) / machines.device.bytes_per_s
    # All that wait for it in a step take about as long as the step.
    link = Link(stage_s / (2 * model.num_layers), 1e12)
    predicted = [_percent(notice) for notice in link_notices(model, laid_out, Dtype.FLOAT32, link)]

    addresses = [f"10.0.0.{rank // PER_HOST}" for rank in range(parallel.num_ranks)]
    links = [
        LinkFacts(first, second, "gloo", link.wait_s, 1e12, 2 * link.wait_s, link.bytes_per_s, 0.0)
        for first, second in itertools.combinations(range(parallel.num_ranks), 2)
    ]
    found = list(check_layout_links(Placed(plan, model, addresses, links, stage_s)))
    measured = [_percent(finding.value) for finding in found if finding.where]
    groups = parallel.pp
    assert len(predicted) == (2 if parallel.pp > 1 else 1)
    assert measured == [predicted[0]] * groups + predicted[1:]
    assert 10 < predicted[0] < 90, "neither nothing nor everything"


def _percent(text: str) -> int:
    match = re.search(r"(\d+)% (?:is lost|of a decode step|of the throughput)", text)
    assert match is not None, text
    return int(match[1])
