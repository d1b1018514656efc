"""From what the user asks to the whole answer."""

from typing import Any

from cluster.plan.devices import Machines, parse_machines
from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.layouts import Degrees
from cluster.plan.link_cost import Link
from cluster.plan.link_notices import parse_link
from cluster.plan.local import this_machine
from cluster.plan.rank_memory import PlanOptions
from cluster.plan.report import PlanReport
from cluster.plan.search import LayoutSearch
from cluster.plan.source import FoundModel, find_model
from engine.config import Dtype, SchedulerConfig
from engine.errors import InvalidOption, LayoutError
from engine.executor.defaults import default_limits
from engine.quantization_config import online_quantization


def plan_model(
    model: str,
    gpus: str | None,
    fixed: Degrees,
    *,
    revision: str | None = None,
    quantization: str | None = None,
    link: str | None = None,
    **wanted: Any,
) -> PlanReport:
    """``gpus``: as ``parse_machines`` reads it, None for this machine; ``link``: as ``parse_link``; ``wanted``: see
    ``plan_options``.

    Raises CheckpointError, InvalidOption, and LayoutError where the fixed degrees are impossible.
    """
    found = find_model(model, revision, quantization)
    machines = this_machine() if gpus is None else parse_machines(gpus)
    known = None if link is None else parse_link(link)
    return make_report(found, machines, fixed, plan_options(found, machines, **wanted), known)


def plan_options(
    model: FoundModel,
    machines: Machines,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    utilization: float = 0.9,
) -> PlanOptions:
    """With the defaults of ``remuda serve``. Raises InvalidOption, naming the option."""
    config = model.shapes.config
    if dtype not in ("auto", *Dtype):
        raise InvalidOption(f"--dtype {dtype} is not known; use auto, {' or '.join(Dtype)}")
    if not 0 < utilization <= 1:
        raise InvalidOption(f"--gpu-memory-utilization must be above 0 and at most 1, not {utilization}")
    longest = config.max_context_len
    if max_model_len is not None and max_model_len > longest:
        raise InvalidOption(f"--max-model-len {max_model_len} is more than the model's {longest} positions")
    limits = default_limits("cuda" if machines.device.is_gpu else "cpu")
    num_seqs = max_num_seqs or limits.max_num_seqs
    batched = max_num_batched_tokens or max(limits.max_num_batched_tokens, num_seqs)
    SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=batched)
    return PlanOptions(
        dtype=config.dtype if dtype == "auto" else Dtype(dtype),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=batched,
        max_model_len=max_model_len,
        utilization=utilization,
    )


def make_report(
    model: FoundModel, machines: Machines, fixed: Degrees, options: PlanOptions, link: Link | None = None
) -> PlanReport:
    """``link``: of every two hosts, where it is known. Raises LayoutError where the fixed degrees are impossible."""
    search = LayoutSearch(model.shapes, options, link)
    plan = search.choose(machines, fixed)
    nearest = None if plan.fits else search.nearest(machines, fixed.determinism)
    quantized = None if plan.fits else _quantized(model, machines, fixed, options, link)
    return PlanReport(model, options, search.counts, plan, nearest, quantized, link)


def _quantized(
    model: FoundModel, machines: Machines, fixed: Degrees, options: PlanOptions, link: Link | None
) -> tuple[str, LayoutPlan] | None:
    """The least ``--quantization`` with which a float model fits after all, and its plan."""
    shapes = model.shapes
    if shapes.config.quantization is not None or not shapes.is_served:
        return None
    for name in ("fp8", "int4"):
        quantized = shapes.with_quantization(online_quantization(name))
        try:
            plan = LayoutSearch(quantized, options, link).choose(machines, fixed)
        except LayoutError:
            continue
        if plan.fits:
            return name, plan
    return None
