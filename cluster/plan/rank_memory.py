"""What each rank of a layout holds: exactly where shapes decide, bounded where libraries do (docs/plan.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.plan.devices import GIB, Device, Machines
from cluster.plan.layouts import host_of
from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.executor.activations import StepSize, activation_bytes, input_bytes
from engine.models.shapes.model_shapes import ModelShapes
from engine.parallel.mesh import Mesh
from engine.weights.ledger import planned_bytes, stage_kv, staged_expert_bytes

MIB = 2**20
CUDA_CONTEXT_BYTES = 1792 * MIB
"""Context, loaded kernels and the workspaces of their libraries, of one process on one GPU."""
NCCL_BYTES = 2 * GIB
"""Buffers of the communicators of a gang of several ranks."""
PROCESS_BYTES = 512 * MIB
"""A rank's interpreter and libraries, in the host's memory."""
FRAGMENTS = 16
"""The allocator may hold so much of the activations again in pieces that fit nothing: one part in so many."""


@dataclass(frozen=True)
class PlanOptions:
    """``dtype`` of activations, cache and unquantized weights. ``max_model_len`` None: the longest that fits.
    ``utilization``: share of a GPU's memory that its rank may use. ``kv_cache_bytes``: what a CPU rank gives to its
    cache; None: what is left. ``counts_libraries``: whether what is only bounded counts as used."""

    dtype: Dtype
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None = None
    utilization: float = 0.9
    kv_cache_bytes: int | None = None
    counts_libraries: bool = True
    block_size: int = 16


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. ``weights`` by kind and ``block_bytes`` are exact, ``activations`` and ``buffers`` follow from
    shapes by formula, ``bounded`` is at most so much. ``budget``: what the rank may use in all; ``kv_cache_bytes``:
    what its cache was given, None: what is left."""

    rank: int
    host: int
    stage: int
    weights: Mapping[str, int]
    groups: tuple[KvGroupConfig, ...]
    block_bytes: int
    activations: int
    buffers: int
    bounded: Mapping[str, int]
    budget: int
    kv_cache_bytes: int | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def beside_cache(self) -> int:
        return self.weight_bytes + self.activations + self.buffers + sum(self.bounded.values())

    @property
    def left(self) -> int:
        """For KV blocks; negative where already the rest is too much."""
        return self.budget - self.beside_cache

    @property
    def num_blocks(self) -> int:
        given = self.left if self.kv_cache_bytes is None else min(self.left, self.kv_cache_bytes)
        return max(given, 0) // self.block_bytes

    @property
    def num_usable_blocks(self) -> int:
        """Block 0 is never handed out."""
        return max(self.num_blocks - 1, 0)


def weights_by_rank(shapes: ModelShapes, layout: ParallelConfig, options: PlanOptions) -> list[Mapping[str, int]]:
    """Every rank's weights by kind, in order of rank. Most ranks of a stage have equal shapes, and each distinct one is
    built once. Raises LayoutError where a quantized matrix cannot be cut so."""
    built: dict[tuple[int, int, int], Mapping[str, int]] = {}
    weights = []
    for rank in range(layout.num_ranks):
        mesh = Mesh(layout, rank)
        key = (mesh.pp_rank, _expert_formats(shapes, mesh), _num_tokens(shapes, mesh))
        if key not in built:
            built[key] = planned_bytes(shapes, mesh, options.dtype).by_kind
        weights.append(built[key])
    return weights


def _expert_formats(shapes: ModelShapes, mesh: Mesh) -> int:
    """Which experts a rank holds matters where each may be in a format of its own."""
    return mesh.ep_rank if shapes.config.quantization is not None and shapes.config.num_experts else 0


def _num_tokens(shapes: ModelShapes, mesh: Mesh) -> int:
    """Rows of the embedding that the rank really has; the last rank may have fewer, and in some formats no padding."""
    vocab_size = shapes.config.vocab_size
    num_rows = -(-vocab_size // mesh.config.tp)
    return min(num_rows, max(0, vocab_size - mesh.tp_rank * num_rows))


def rank_memories(
    shapes: ModelShapes,
    layout: ParallelConfig,
    machines: Machines,
    options: PlanOptions,
    weights: Sequence[Mapping[str, int]],
    max_model_len: int,
) -> list[RankMemory]:
    """Every rank's, in order. ``max_model_len``: tokens of the longest context."""
    step = StepSize(options.max_num_batched_tokens, options.max_num_seqs, max_model_len)
    activations = activation_bytes(shapes.config, layout, step, options.dtype)
    device = machines.device
    stages = [
        stage_kv(shapes, Mesh(layout, stage * layout.dp * layout.tp), options.block_size, options.dtype)
        for stage in range(layout.pp)
    ]
    memories = []
    for rank, by_kind in enumerate(weights):
        stage = Mesh(layout, rank).pp_rank
        kv = stages[stage]
        memories.append(
            RankMemory(
                rank=rank,
                host=host_of(rank, layout, machines),
                stage=stage,
                weights=by_kind,
                groups=kv.groups,
                block_bytes=kv.block_bytes,
                activations=activations,
                buffers=input_bytes(step, len(kv.groups), options.block_size) + _staged(shapes, layout, rank, by_kind),
                bounded=_bounded(device.is_gpu, layout.num_ranks, activations) if options.counts_libraries else {},
                budget=budget_of(device, options),
                kv_cache_bytes=options.kv_cache_bytes,
            )
        )
    return memories


def _staged(shapes: ModelShapes, layout: ParallelConfig, rank: int, weights: Mapping[str, int]) -> int:
    """Of experts on their way to this rank."""
    layers = Mesh(layout, rank).layers(shapes.config)
    num_mixtures = sum(shapes.config.layers[layer].moe is not None for layer in layers)
    return staged_expert_bytes(weights.get("experts", 0), num_mixtures, layout)


def budget_of(device: Device, options: PlanOptions) -> int:
    """Bytes that a rank may use in all."""
    return int(options.utilization * device.usable_bytes) if device.is_gpu else device.usable_bytes


def _bounded(is_gpu: bool, num_ranks: int, activations: int) -> dict[str, int]:
    if not is_gpu:
        return {"process": PROCESS_BYTES}
    # The pool of CUDA graphs lies outside what a rank may use; nobody has measured it yet.
    return {
        "cuda_context": CUDA_CONTEXT_BYTES,
        "nccl": NCCL_BYTES if num_ranks > 1 else 0,
        "cuda_graphs": 0,
        "fragmentation": activations // FRAGMENTS,
    }
