"""A plan as values of the chart helm/remuda: `remuda plan --format helm`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.config import EMBEDDED_MODEL
from cluster.plan.devices import GIB
from cluster.plan.helm_sizing import sizing
from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.rank_memory import MIB, PlanOptions
from cluster.plan.report import PlanReport, layout_text
from engine.config import Determinism
from engine.errors import LayoutError
from engine.executor.defaults import default_limits

CLAIM = "models"
"""The claim with checkpoints that the values name; the user's may be called otherwise."""
_SLOW_DISK_BYTES_PER_S = 500e6
_START_MINUTES = 10
"""For everything but reading weights: images, processes, warm-up, graph capture, the self-test."""


def helm_values_text(report: PlanReport, quantization: str | None = None) -> str:
    """The YAML text of ``helm_values`` behind a comment that says what it is for."""
    plan = report.plan
    values = yaml.safe_dump(helm_values(report, quantization), sort_keys=False)
    return (
        f"# {report.model.name} on {plan.machines}: {layout_text(plan.layout)},\n"
        f"# requests of up to {plan.max_model_len:,} tokens, {plan.num_contexts:,} such at once.\n{values}"
    )


def helm_values(report: PlanReport, quantization: str | None = None) -> dict[str, Any]:
    """The values that differ from the chart's own, and what they were made for (``sizing``). ``quantization``: as it
    was asked of a float checkpoint.

    Raises LayoutError where the plan does not fit, or the chart cannot place it.
    """
    plan, options, name = report.plan, report.options, report.model.name
    if not report.model.shapes.is_served:
        raise LayoutError(f"{report.model.shapes.config.architecture} is not served, so there are no values for it")
    if not plan.fits:
        raise LayoutError(f"no values for what does not fit: {plan.reasons[0]}{_nearest_text(report)}")
    hosts, per_host = chart_hosts(plan)
    is_gpu = plan.machines.device.is_gpu
    layout = plan.layout
    values = {
        "model": {"path": name, **_model(report, quantization)},
        "parallel": {"tensor": layout.tp, "pipeline": layout.pp, "data": layout.dp, "expert": layout.ep},
        "engine": {
            "mode": "lws" if is_gpu or hosts > 1 else "single",
            "hosts": hosts,
            "devicesPerHost": per_host,
            "device": "cuda" if is_gpu else "cpu",
            "resources": _gpu_host(per_host) if is_gpu else _cpu_host(plan, per_host),
            **_memory(plan, options),
            "startupMinutes": _startup_minutes(plan, per_host),
        },
        "weights": {"source": "none"} if name == EMBEDDED_MODEL else {"source": "pvc", "existingClaim": CLAIM},
    }
    return {**values, "sizing": sizing(report, values)}


def chart_hosts(plan: LayoutPlan) -> tuple[int, int]:
    """(hosts, devices of each) with exactly as many devices as ranks, equally many on each host.

    Raises LayoutError where the layout needs something else.
    """
    layout, machines = plan.layout, plan.machines
    if layout.tp > machines.per_host:
        raise LayoutError(f"the chart keeps tensor parallelism on one host: give --tp {machines.per_host} or less")
    num_groups = layout.pp * layout.dp
    for per_host in range(min(machines.per_host // layout.tp, num_groups), 0, -1):
        if num_groups % per_host == 0 and num_groups // per_host <= machines.num_hosts:
            return num_groups // per_host, per_host * layout.tp
    raise LayoutError(
        f"pp × dp = {num_groups} groups of {layout.tp} ranks do not divide evenly over {machines}: give --pp or --dp"
    )


def _nearest_text(report: PlanReport) -> str:
    nearest = report.nearest
    return "" if nearest is None else f"; nearest that fits: {nearest.machines} with {layout_text(nearest.layout)}"


def _model(report: PlanReport, quantization: str | None) -> Mapping[str, Any]:
    """What was asked of the model, as far as it is no default."""
    options = report.options
    asked: dict[str, Any] = {}
    if options.dtype is not report.model.shapes.config.dtype:
        asked["dtype"] = options.dtype.value
    if quantization is not None:
        asked["quantization"] = quantization
    if options.max_model_len is not None:
        asked["maxLen"] = options.max_model_len
    limits = default_limits("cuda" if report.plan.machines.device.is_gpu else "cpu")
    if options.max_num_seqs != limits.max_num_seqs:
        asked["maxNumSeqs"] = options.max_num_seqs
    if extra := list(_extra_args(report, max(limits.max_num_batched_tokens, options.max_num_seqs))):
        asked["extraArgs"] = extra
    return asked


def _extra_args(report: PlanReport, default_batched_tokens: int) -> Iterator[str]:
    layout = report.plan.layout
    if report.options.max_num_batched_tokens != default_batched_tokens:
        yield f"--max-num-batched-tokens={report.options.max_num_batched_tokens}"
    if layout.balances_experts:
        yield "--enable-eplb"
    if layout.num_redundant_experts:
        yield f"--num-redundant-experts={layout.num_redundant_experts}"
    if layout.determinism is not Determinism.OFF:
        yield f"--deterministic={layout.determinism}"


def _memory(plan: LayoutPlan, options: PlanOptions) -> Mapping[str, Any]:
    if plan.machines.device.is_gpu:
        return {} if options.utilization == PlanOptions.utilization else {"gpuMemoryUtilization": options.utilization}
    cache = min(rank.num_blocks * rank.block_bytes for rank in plan.ranks)
    return {"kvCacheMemory": f"{cache // MIB}MiB", "sharedMemory": "1Gi"}


def _gpu_host(per_host: int) -> Mapping[str, str]:
    """Of the host: two cores and 8 GiB for each GPU's process, and the leader, Ray and /dev/shm."""
    return {"cpu": str(4 + 2 * per_host), "memory": f"{16 + 8 * per_host}Gi"}


def _cpu_host(plan: LayoutPlan, per_host: int) -> Mapping[str, str]:
    """A core for each rank and two for leader, front end and Ray; all that the ranks may use, and 3 GiB for the others
    and /dev/shm."""
    return {
        "cpu": str(per_host + 2),
        "memory": f"{math.ceil(per_host * plan.machines.device.usable_bytes / GIB) + 3}Gi",
    }


def _startup_minutes(plan: LayoutPlan, per_host: int) -> int:
    """Long enough for the fullest host's weights from a slow disk."""
    num_bytes = per_host * max(rank.weight_bytes for rank in plan.ranks)
    return _START_MINUTES + math.ceil(num_bytes / _SLOW_DISK_BYTES_PER_S / 60)
