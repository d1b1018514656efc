"""What a launch will need of memory, and its refusal where this host certainly has too little. Reads no weights."""

from cluster.plan.devices import Machines
from cluster.plan.layout_plan import LayoutPlan, plan_layout
from cluster.plan.local import cpu_ranks, local_gpus
from cluster.plan.rank_memory import PlanOptions, weights_by_rank
from cluster.plan.report import layout_text
from cluster.plan.search import LayoutSearch
from cluster.replica.events import MemoryPlanned, ReplicaPlan
from cluster.replica.model_source import ModelSource
from engine.config import Dtype
from engine.errors import DoesNotFit
from engine.model_config import ModelConfig
from engine.models.shapes.model_shapes import ModelShapes
from engine.models.shapes.registry import served_shapes


def plan_memory(plan: ReplicaPlan, num_local_ranks: int) -> MemoryPlanned:
    """What each rank of a replica will hold, from shapes.

    Only this host's memory is known, so only what its ``num_local_ranks`` ranks need is held against it; the ranks of
    other hosts find out themselves. Nothing is refused for what libraries might take.

    Raises DoesNotFit, naming a rank, the bytes that it lacks and what would fit.
    """
    directory = ModelSource(plan.model, plan.revision).directory()
    shapes = served_shapes(ModelConfig.from_directory(directory, plan.quantization))
    on_gpus = plan.device == "cuda"
    options = PlanOptions(
        dtype=Dtype(plan.dtype),
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        utilization=plan.gpu_memory_utilization,
        kv_cache_bytes=None if on_gpus else plan.kv_cache_memory_bytes,
        counts_libraries=False,
    )
    weights = weights_by_rank(shapes, plan.parallel, options)
    planned = [sum(by_kind.values()) for by_kind in weights]
    machines = _machines(num_local_ranks, on_gpus=on_gpus)
    if machines is None:
        return MemoryPlanned(planned, None)
    found = plan_layout(shapes, plan.parallel, machines, options, weights)
    if not found.fits:
        raise DoesNotFit(f"{found.reasons[0]}; {_remedy(shapes, found, options)}")
    return MemoryPlanned(planned, min(rank.num_blocks for rank in found.ranks))


def _machines(num_local_ranks: int, *, on_gpus: bool) -> Machines | None:
    if not num_local_ranks:
        return None
    return local_gpus() if on_gpus else cpu_ranks(num_local_ranks)


def _remedy(shapes: ModelShapes, plan: LayoutPlan, options: PlanOptions) -> str:
    if plan.machines.device.is_gpu:
        nearest = LayoutSearch(shapes, options).nearest(plan.machines)
        if nearest is None:
            return "no layout on more GPUs of this kind fits either; use --quantization, or larger GPUs"
        return f"nearest that fits: {nearest.machines} with {layout_text(nearest.layout)}"
    left = min(rank.left for rank in plan.ranks)
    one_block = max(rank.block_bytes for rank in plan.ranks)
    if left > 2 * one_block:
        return f"--kv-cache-memory {left // 2**20}MiB would fit, for the ranks of this host share its memory"
    host = plan.machines.device.usable_bytes * plan.machines.num_devices
    return f"the {host:,} bytes that this host has left are too few: use --quantization, or more hosts (--address)"
