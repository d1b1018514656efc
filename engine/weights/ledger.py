"""How many bytes each rank will hold, from shapes alone: the model is built on the meta device and its parameters are
added up, so the ledger comes from the same code as the real ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.kv_groups import num_layer_slots
from engine.model_config import ModelConfig, num_local_kv_heads
from engine.models.shapes.model_shapes import ModelShapes
from engine.models.shapes.registry import served_shapes
from engine.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardBytes:
    """Bytes of one rank's weights by kind: embedding, head, attention, experts, feed_forward, norm, vision."""

    by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def held_bytes(model: nn.Module) -> ShardBytes:
    """What ``model`` holds, on a device or on meta: padding of the vocabulary and the scales of quantized matrices
    included, tied tensors once."""
    by_kind: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = _kind(name)
        by_kind[kind] = by_kind.get(kind, 0) + tensor.numel() * tensor.element_size()
    return ShardBytes(by_kind)


def shard_bytes(config: ModelConfig, parallel: ParallelConfig, rank: int, dtype: Dtype) -> ShardBytes:
    """What global rank ``rank`` of a served model will hold.

    Raises LayoutError where a quantized matrix cannot be cut so.
    """
    return planned_bytes(served_shapes(config), Mesh(parallel, rank), dtype)


def planned_bytes(shapes: ModelShapes, mesh: Mesh, dtype: Dtype) -> ShardBytes:
    """As ``shard_bytes``, of any model whose shapes are known, for the rank that ``mesh`` stands for."""
    held = held_bytes(shapes.build(mesh, dtype))
    if shapes.is_served or not shapes.vision:
        return held
    return ShardBytes({**held.by_kind, "vision": _numel(shapes.vision) * dtype.num_bytes})


def staged_expert_bytes(experts_bytes: int, num_layers: int, parallel: ParallelConfig) -> int:
    """Most bytes of experts that a rank has read and not yet put in their place: all of one layer's.

    ``experts_bytes``: of all its ``num_layers`` mixture layers.
    """
    return -(-experts_bytes // num_layers) if parallel.balances_experts and num_layers else 0


@dataclass(frozen=True)
class ParameterCounts:
    """``total``: of the whole checkpoint. ``vision``: of it, vision encoder and projector. ``active``: what one token
    of text uses: all of the text model but the experts that it is not sent to."""

    total: int
    vision: int
    active: int


def count_parameters(shapes: ModelShapes) -> ParameterCounts:
    """Of the model before it was quantized."""
    model = shapes.with_quantization(None).build(Mesh(), Dtype.BFLOAT16)
    text = experts = 0
    for name, parameter in model.named_parameters():
        text += parameter.numel()
        experts += parameter.numel() if _kind(name) == "experts" else 0
    moe = next((layer.moe for layer in shapes.config.layers if layer.moe), None)
    idle = experts - experts // moe.num_experts * moe.num_experts_per_token if moe else 0
    vision = _numel(shapes.vision)
    return ParameterCounts(text + vision, vision, text - idle)


def kv_block_bytes(config: ModelConfig, mesh: Mesh, block_size: int, dtype: Dtype) -> int:
    """Bytes of one KV block on a rank: keys and values of ``block_size`` tokens in the layers of one group."""
    heads = num_local_kv_heads(config, mesh.config)
    num_slots = num_layer_slots(mesh.kv_groups(config))
    return 2 * num_slots * block_size * heads * config.head_dim * dtype.num_bytes


@dataclass(frozen=True)
class StageKv:
    """The KV cache of a rank: its layers in groups, and the bytes of one block."""

    groups: tuple[KvGroupConfig, ...]
    block_bytes: int


def stage_kv(shapes: ModelShapes, mesh: Mesh, block_size: int, dtype: Dtype) -> StageKv:
    """Of the rank that ``mesh`` stands for; of a pipeline stage, its own layers only."""
    config = shapes.config
    groups = mesh.kv_groups(config, shapes.cross_attention_layers)
    elements = shapes.latent_kv_size or 2 * num_local_kv_heads(config, mesh.config) * config.head_dim
    # A stage of nothing but cross attention keeps as little, but not nothing.
    return StageKv(groups, max(1, num_layer_slots(groups)) * block_size * elements * dtype.num_bytes)


def kv_token_bytes(shapes: ModelShapes, dtype: Dtype) -> int:
    """Bytes that one token keeps in the cache of the whole, undivided model."""
    kv = stage_kv(shapes, Mesh(), 1, dtype)
    return kv.block_bytes * len(kv.groups)


def _numel(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _kind(parameter_name: str) -> str:
    """From the names of DecoderModel's modules."""
    for part, kind in (
        ("embedding", "embedding"),
        ("head", "head"),
        ("norm", "norm"),
        ("attention", "attention"),
        (".experts", "experts"),
    ):
        if part in parameter_name:
            return kind
    return "feed_forward"
