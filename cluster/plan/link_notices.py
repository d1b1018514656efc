"""What a layout pays for links between hosts, as sentences: tensor parallelism, exchanges of tokens, stages. Pure.

Predictions are of a decode step, in which each rank reads its weights once at the device's memory rate.
"""

import re
from collections.abc import Iterator

from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.layouts import num_crossings, ranks_beside
from cluster.plan.link_cost import (
    Link,
    StepTraffic,
    expert_exchange_traffic,
    pipeline_loss,
    pipeline_traffic,
    predicted_loss,
    tensor_parallel_traffic,
)
from engine.config import Dtype
from engine.errors import InvalidOption
from engine.executor.defaults import plans_in_flight
from engine.model_config import ModelConfig

DECODING_REQUESTS = 8
"""Of the step whose loss is predicted."""


def parse_link(text: str) -> Link:
    """``5ms,10Gbit``: one way between two hosts. Raises InvalidOption."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|us),(\d+(?:\.\d+)?)([GM])bit", text.replace(" ", ""), re.IGNORECASE)
    if match is None or not float(match[3]):
        raise InvalidOption(f"--link {text!r} cannot be read; write its delay one way and its rate, as in 0.1ms,10Gbit")
    wait_s = float(match[1]) / (1e3 if match[2].lower() == "ms" else 1e6)
    return Link(wait_s, float(match[3]) * (1e9 if match[4].lower() == "g" else 1e6) / 8)


def link_notices(config: ModelConfig, plan: LayoutPlan, dtype: Dtype, link: Link | None) -> Iterator[str]:
    """``link``: of every two hosts; None: not known, so that only what crosses hosts for ``--tp`` is told."""
    layout, per_host = plan.layout, plan.machines.per_host
    if layout.tp > per_host:
        traffic = tensor_parallel_traffic(config, layout.tp, per_host, 1 if link is None else DECODING_REQUESTS,
                                          dtype.num_bytes)  # fmt: skip
        loss = f"{_unknown(traffic)}; give --link" if link is None else _loss(plan, traffic, link)
        yield (
            f"--tp {layout.tp} crosses hosts of {per_host}: every step waits for {traffic.num_collectives} collectives "
            f"between hosts, {loss}; --pp across hosts waits for far fewer"
        )
    if link is None:
        return
    stage_size = layout.dp * layout.tp
    if config.num_experts and layout.exchanges_tokens and (beside := ranks_beside(layout, plan.machines)):
        exchanges = expert_exchange_traffic(config, stage_size, beside, DECODING_REQUESTS, dtype.num_bytes)
        yield (
            f"tokens go to their experts across hosts: every step waits for {exchanges.num_collectives} exchanges, "
            f"{_loss(plan, exchanges, link)}"
        )
    if layout.pp > 1 and (crossings := num_crossings(layout, plan.machines)):
        yield _stages(config, plan, dtype, link, crossings)


def _stages(config: ModelConfig, plan: LayoutPlan, dtype: Dtype, link: Link, crossings: int) -> str:
    pp = plan.layout.pp
    in_flight = plans_in_flight("cuda" if plan.machines.device.is_gpu else "cpu", pp)
    size = -(-DECODING_REQUESTS // in_flight)
    link_s = pipeline_traffic(config, crossings, size, dtype.num_bytes).seconds(link)
    loss = pipeline_loss(_stage_seconds(plan), pp, in_flight, link_s)
    return (
        f"--pp {pp} crosses hosts {crossings} times: a token takes {link_s * 1e3:,.2f} ms longer, which loses "
        f"{loss:.0%} of the throughput of {in_flight} micro-batches in flight"
    )


def _unknown(traffic: StepTraffic) -> str:
    return (
        f"so {traffic.num_collectives} ms for each millisecond that one takes, and sends {traffic.num_bytes:,} bytes "
        f"out of a host for each token; remuda doctor measures the link and predicts the loss"
    )


def _loss(plan: LayoutPlan, traffic: StepTraffic, link: Link) -> str:
    step_s, link_s = plan.layout.pp * _stage_seconds(plan), traffic.seconds(link)
    return (
        f"which take {link_s * 1e3:,.2f} ms beside {step_s * 1e3:,.2f} ms of reading weights at "
        f"{plan.machines.device.bytes_per_s / 1e9:,.0f} GB/s: {predicted_loss(step_s, link_s):.0%} is lost"
    )


def _stage_seconds(plan: LayoutPlan) -> float:
    return max(rank.weight_bytes for rank in plan.ranks) / plan.machines.device.bytes_per_s
