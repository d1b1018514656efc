"""The decoder layers of each architecture, as config.json describes them. Torch-free.

Where config.json is silent, the values are those that transformers assumes for the architecture.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError


class QkNorm(enum.StrEnum):
    """RMS norm over each head of queries and keys."""

    WEIGHTED_BEFORE_ROPE = "weighted-before-rope"
    """Qwen3: one weight per channel, shared by the heads; then the rotation."""
    UNWEIGHTED_AFTER_ROPE = "unweighted-after-rope"
    """Llama 4."""


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts of one layer. Every expert, and the shared one, is a gated MLP of ``intermediate_size``.

    ``normalize_scores``: the chosen experts' scores are divided by their sum. ``has_shared_expert``: one more expert
    sees every token.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalize_scores: bool = False
    has_shared_expert: bool = False


@dataclass(frozen=True)
class TemperatureConfig:
    """Query scale that grows with position p: 1 + scale · log1p(floor((p + 1) / floor)). Llama 4's NoPE layers;
    after "Scalable-Softmax Is Superior for Attention" (arXiv 2501.19399)."""

    floor: float
    scale: float


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    ``use_rope``: False for Llama 4's NoPE layers. ``chunk_size``: a token attends only within its chunk of so many
    positions. ``window_size``: it attends to itself and those before it, so many in all. Without either, to all before
    it. ``intermediate_size``: width of the dense MLP; unused where ``moe`` is set.
    """

    intermediate_size: int
    use_rope: bool = True
    chunk_size: int | None = None
    window_size: int | None = None
    qk_norm: QkNorm | None = None
    temperature: TemperatureConfig | None = None
    moe: MoeConfig | None = None


def llama_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    return (LayerConfig(int(text["intermediate_size"])),) * int(text["num_hidden_layers"])


def mistral_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """All layers slide; null, unlike silence, means that none does."""
    layer = LayerConfig(int(text["intermediate_size"]), window_size=_window(text.get("sliding_window", 4096)))
    return (layer,) * int(text["num_hidden_layers"])


def mixtral_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    width = int(text["intermediate_size"])
    moe = MoeConfig(
        num_experts=int(text["num_local_experts"]),
        num_experts_per_token=int(text.get("num_experts_per_tok", 2)),
        intermediate_size=width,
        normalize_scores=True,
    )
    layer = LayerConfig(width, window_size=_window(text.get("sliding_window")), moe=moe)
    return (layer,) * int(text["num_hidden_layers"])


def qwen3_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    count = int(text["num_hidden_layers"])
    window = _qwen3_window(text)
    first_sliding = int(text.get("max_window_layers", 28))
    sliding = "sliding_attention"
    kinds = text.get("layer_types") or [sliding if i >= first_sliding else "full_attention" for i in range(count)]
    _check_one_a_layer(count, layer_types=kinds)
    return tuple(
        LayerConfig(
            intermediate_size=int(text["intermediate_size"]),
            window_size=window if kind == sliding else None,
            qk_norm=QkNorm.WEIGHTED_BEFORE_ROPE,
        )
        for kind in kinds
    )


def qwen3_moe_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Mixtures in the layers step - 1, 2 · step - 1, … that ``mlp_only_layers`` does not name."""
    # transformers v5 writes num_local_experts; the hub's files have num_experts.
    num_experts = text["num_experts"] if text.get("num_local_experts") is None else text["num_local_experts"]
    moe = MoeConfig(
        num_experts=int(num_experts),
        num_experts_per_token=int(text.get("num_experts_per_tok", 8)),
        intermediate_size=int(text["moe_intermediate_size"]),
        normalize_scores=bool(text.get("norm_topk_prob", False)),
    )
    step = int(text.get("decoder_sparse_step", 1))
    dense = text.get("mlp_only_layers") or ()
    return tuple(
        LayerConfig(
            intermediate_size=int(text["intermediate_size"]),
            window_size=_qwen3_window(text),
            qk_norm=QkNorm.WEIGHTED_BEFORE_ROPE,
            moe=moe if i not in dense and moe.num_experts and (i + 1) % step == 0 else None,
        )
        for i in range(int(text["num_hidden_layers"]))
    )


def llama4_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    count = int(text["num_hidden_layers"])
    step = int(text.get("interleave_moe_layer_step") or 1)
    moe_layers = text.get("moe_layers")
    if moe_layers is None:
        moe_layers = range(step - 1, count, step)
    interval = int(text.get("no_rope_layer_interval") or 4)
    # An empty list stands in the hub's own files and means the default pattern. 1 is a layer *with* rotation.
    rope_flags = text.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    chunked = "chunked_attention"
    kinds = text.get("layer_types") or [chunked if flag else "full_attention" for flag in rope_flags]
    _check_one_a_layer(count, no_rope_layers=rope_flags, layer_types=kinds)
    chunk_size = text.get("attention_chunk_size", 8192)
    temperature = None
    if text.get("attn_temperature_tuning", True):
        temperature = TemperatureConfig(float(text.get("floor_scale", 8192)), float(text.get("attn_scale", 0.1)))
    moe = MoeConfig(
        num_experts=int(text.get("num_local_experts") or 0),
        num_experts_per_token=int(text.get("num_experts_per_tok", 1)),
        intermediate_size=int(text["intermediate_size"]),
        has_shared_expert=True,
    )
    qk_norm = QkNorm.UNWEIGHTED_AFTER_ROPE if text.get("use_qk_norm", True) else None
    return tuple(
        LayerConfig(
            intermediate_size=int(text["intermediate_size_mlp"]),
            use_rope=bool(rope_flags[i]),
            chunk_size=int(chunk_size) if chunk_size and kinds[i] == chunked else None,
            qk_norm=qk_norm if rope_flags[i] else None,
            temperature=None if rope_flags[i] else temperature,
            moe=moe if i in moe_layers and moe.num_experts else None,
        )
        for i in range(count)
    )


def _window(value: Any) -> int | None:
    return None if value is None else int(value)


def _qwen3_window(text: Mapping[str, Any]) -> int | None:
    return _window(text.get("sliding_window", 4096)) if text.get("use_sliding_window") else None


def _check_one_a_layer(count: int, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise CheckpointError(f"config.json: {name} has {len(values)} entries; it must have {count}, one a layer")
