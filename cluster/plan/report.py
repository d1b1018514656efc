"""A plan as one JSON object, whose fields are part of the product's contract, and its sentences for people."""

from dataclasses import dataclass
from typing import Any

from cluster.plan.dispatch import LEAST_GAIN, DecodeEstimate, DispatchChoice
from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.link_cost import Link
from cluster.plan.link_notices import link_notices
from cluster.plan.rank_memory import PlanOptions, RankMemory
from cluster.plan.source import FoundModel
from engine.config import Determinism, ParallelConfig
from engine.model_config import ModelConfig
from engine.parallel.mesh import Mesh
from engine.weights.ledger import ParameterCounts, kv_token_bytes, stage_kv


@dataclass(frozen=True)
class PlanReport:
    """Everything that ``remuda plan`` tells. ``nearest``: the nearest layout that fits, where the plan does not;
    ``quantized``: the ``--quantization`` with which a float model fits on the same machines after all, and that
    plan; ``link``: of every two hosts, where it is known."""

    model: FoundModel
    options: PlanOptions
    counts: ParameterCounts
    plan: LayoutPlan
    nearest: LayoutPlan | None = None
    quantized: tuple[str, LayoutPlan] | None = None
    link: Link | None = None

    @property
    def kv_token_bytes(self) -> int:
        return kv_token_bytes(self.model.shapes, self.options.dtype)

    def notices(self) -> list[str]:
        """What one must know of the model or the layout beside the numbers."""
        shapes, plan = self.model.shapes, self.plan
        found = []
        if not shapes.is_served:
            found.append(f"{shapes.config.architecture} is not served by this version; only its shapes are known")
        found += link_notices(shapes.config, plan, self.options.dtype, self.link)
        if shapes.vision and shapes.is_served:
            found.append("the vision part is not loaded: only text is served")
        elif shapes.vision:
            found.append("the vision part is counted whole on every rank")
        if shapes.cross_attention_layers:
            per_token = self.kv_token_bytes // (shapes.config.num_layers - len(shapes.cross_attention_layers))
            bytes_more = per_token * len(shapes.cross_attention_layers)
            found.append(f"cross attention keeps {bytes_more:,} bytes for each token of an image besides")
        return found

    def windowed(self) -> tuple[int, int] | None:
        """(positions, bytes): what a token keeps once so many have come after it; None where it keeps all."""
        kv = stage_kv(self.model.shapes, Mesh(), 1, self.options.dtype)
        spans = [group.chunk_size or group.window_size for group in kv.groups if not group.is_full]
        if not spans:
            return None
        return max(span for span in spans if span), sum(group.is_full for group in kv.groups) * kv.block_bytes


def as_object(report: PlanReport) -> dict[str, Any]:
    shapes, plan, licence = report.model.shapes, report.plan, report.model.licence
    config, device = shapes.config, plan.machines.device
    return {
        "model": report.model.name,
        "architecture": config.architecture,
        "served": shapes.is_served,
        "parameters": report.counts.total,
        "active_parameters": report.counts.active,
        "vision_parameters": report.counts.vision,
        "kv_bytes_per_token": report.kv_token_bytes,
        "dtype": report.options.dtype.value,
        "quantization": config.quantization.name if config.quantization else None,
        "device": {"name": device.name, "usable_bytes": device.usable_bytes},
        "num_hosts": plan.machines.num_hosts,
        "devices_per_host": plan.machines.per_host,
        "layout": _degrees(plan.layout),
        "expert_dispatch": expert_dispatch(config, plan.layout),
        "expert_dispatch_choice": _choice(plan.dispatch),
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "max_model_len": plan.max_model_len,
        "kv_cache_tokens": plan.kv_tokens,
        "num_full_contexts": plan.num_contexts,
        "max_num_seqs": report.options.max_num_seqs,
        "max_num_batched_tokens": report.options.max_num_batched_tokens,
        "ranks": [_rank(rank) for rank in plan.ranks],
        "nearest": _nearest(report.nearest),
        "quantized": _quantized(report.quantized),
        "notices": report.notices(),
        "licence": {"name": licence.name, "attribution": licence.attribution, "notices": list(licence.notices)},
    }


def expert_dispatch(config: ModelConfig, layout: ParallelConfig) -> str | None:
    """How tokens come to their experts; None where there are none."""
    if not config.num_experts:
        return None
    return "all-to-all" if layout.exchanges_tokens else "replicated"


def _choice(choice: DispatchChoice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    return {
        "num_requests": choice.load.num_requests,
        "context_len": choice.load.context_len,
        "least_gain": LEAST_GAIN,
        "replicated": _estimate(choice.replicated),
        "all_to_all": _estimate(choice.exchanged),
    }


def _estimate(estimate: DecodeEstimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "layout": _degrees(estimate.layout),
        "kv_cache_tokens": estimate.kv_tokens,
        "num_requests": estimate.num_requests,
        "tokens_per_s": round(estimate.tokens_per_s, 1),
    }


def dispatch_reason(plan: LayoutPlan) -> str | None:
    """Why the plan's form of expert parallelism was chosen; None where there was nothing to choose."""
    choice = plan.dispatch
    if choice is None:
        return None
    forms = {"all-to-all": choice.exchanged, "replicated": choice.replicated}
    told = "; ".join(f"{form} {_estimate_text(estimate)}" for form, estimate in forms.items())
    link = "" if choice.knows_link or plan.machines.num_hosts == 1 else ", and between hosts only with --link"
    return (
        f"expert dispatch, predicted for {choice.load.num_requests:,} requests of {choice.load.context_len:,} tokens: "
        f"{told}. All-to-all is chosen where it decodes {LEAST_GAIN:.0%} more{link}."
    )


def _estimate_text(estimate: DecodeEstimate | None) -> str:
    if estimate is None:
        return "does not fit"
    return (
        f"({layout_text(estimate.layout)}) {estimate.tokens_per_s:,.0f} tokens/s, {estimate.num_requests:,} at once, "
        f"room for {estimate.kv_tokens:,} tokens"
    )


def _rank(rank: RankMemory) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "stage": rank.stage,
        "weights": dict(rank.weights),
        "weight_bytes": rank.weight_bytes,
        "kv_cache_bytes": rank.num_blocks * rank.block_bytes,
        "num_kv_blocks": rank.num_blocks,
        "kv_block_bytes": rank.block_bytes,
        "activation_bytes": rank.activations,
        "buffer_bytes": rank.buffers,
        "bounded": dict(rank.bounded),
        "budget_bytes": rank.budget,
    }


def _quantized(found: tuple[str, LayoutPlan] | None) -> dict[str, Any] | None:
    return None if found is None else {"quantization": found[0], **(_nearest(found[1]) or {})}


def _nearest(plan: LayoutPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    machines = plan.machines
    return {
        "num_hosts": machines.num_hosts,
        "devices_per_host": machines.per_host,
        "layout": _degrees(plan.layout),
        "max_model_len": plan.max_model_len,
    }


def _degrees(layout: ParallelConfig) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "ep": layout.ep}


def layout_text(layout: ParallelConfig) -> str:
    """As options of the command line; degrees of 1 are left out, but not all."""
    degrees = {name: degree for name, degree in _degrees(layout).items() if degree > 1} or {"tp": 1}
    options = [f"--{name} {degree}" for name, degree in degrees.items()]
    if layout.determinism is not Determinism.OFF:
        options.append(f"--deterministic {layout.determinism}")
    return " ".join(options)
