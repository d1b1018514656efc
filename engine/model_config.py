"""What a checkpoint's config.json says of its model, in the engine's own words. Torch-free.

Both forms in circulation are read: that of transformers v4 (``rope_theta`` + ``rope_scaling``, ``torch_dtype``) and
that of v5 (``rope_parameters``, ``dtype``, explicit per-layer lists).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.errors import CheckpointError, InvalidOption, LayoutError
from engine.quantization_config import QuantizationConfig, online_quantization, parse_quantization
from engine.rope_config import RopeConfig, RopeType, parse_rope

PLAN_ONLY_ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Phi3ForCausalLM",
)
"""Whose shapes ``remuda plan`` knows, and which are not served."""


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts of one layer. Every expert, and the shared one, is a gated MLP of ``intermediate_size``."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int


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
    positions; None for all before it. ``qk_norm``: weightless RMS norm of queries and keys after the rotation.
    ``intermediate_size``: width of the dense MLP; unused where ``moe`` is set.
    """

    intermediate_size: int
    use_rope: bool = True
    chunk_size: int | None = None
    qk_norm: bool = False
    temperature: TemperatureConfig | None = None
    moe: MoeConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. ``tensor_prefix`` stands before the names of all its tensors in the checkpoint."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: Dtype = Dtype.FLOAT32
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tensor_prefix: str = ""
    quantization: QuantizationConfig | None = None

    @classmethod
    def from_directory(cls, path: str | Path, quantization: str | None = None) -> Self:
        """Read config.json, and generation_config.json where there is one. ``quantization``: int8, int4 or fp8 to
        quantize a float checkpoint while loading it.

        Raises CheckpointError where config.json is missing, broken, or of a model that is not served; InvalidOption
        where ``quantization`` is unknown or the checkpoint is quantized already.
        """
        directory = Path(path)
        config = _read_json(directory / "config.json")
        if config is None:
            raise CheckpointError(f"{directory} has no config.json; name a directory in Hugging Face form")
        model = cls.from_hf(config, _read_json(directory / "generation_config.json"))
        return model if quantization is None else model.quantized(quantization)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> Self:
        """As ``from_directory``, from the files' contents."""
        architecture = next(iter(config.get("architectures") or [str(config.get("model_type"))]))
        if architecture in PLAN_ONLY_ARCHITECTURES:
            raise CheckpointError(
                f"{architecture} is not served: remuda plan knows its shapes; serving comes later. "
                f"Served are {', '.join(sorted(_LAYER_PARSERS))}"
            )
        if architecture not in _LAYER_PARSERS:
            raise CheckpointError(
                f"config.json names architecture {architecture!r}; served are {', '.join(sorted(_LAYER_PARSERS))}"
            )
        # Llama 4 with vision nests its text model; the vision part is not read.
        text = {**config, **(config.get("text_config") or {})}
        try:
            scheme = text.get("quantization_config")
            quantization = parse_quantization(scheme) if scheme else None
            fields = _parse_fields(architecture, text, generation_config or {})
            return cls(architecture=architecture, quantization=quantization, **fields)
        except KeyError as error:
            raise CheckpointError(f"config.json of {architecture} lacks {error.args[0]!r}") from error

    def quantized(self, name: str) -> Self:
        """The same model, its float weights to be quantized while they are loaded. Raises InvalidOption."""
        online = online_quantization(name)
        if self.quantization is not None:
            raise InvalidOption(
                f"--quantization {name}: the checkpoint is quantized already, as {self.quantization.name}; leave it out"
            )
        return replace(self, quantization=online)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_context_len(self) -> int:
        """Tokens of the longest context that the model was made for. Linear, dynamic and YaRN checkpoints may name the
        length before it was stretched (transformers does not say which); Llama 3's name the length after."""
        if self.rope.kind in (RopeType.LINEAR, RopeType.DYNAMIC, RopeType.YARN):
            return max(self.max_position_embeddings, int(self.rope.original_max_positions * self.rope.factor))
        return self.max_position_embeddings

    @property
    def num_experts(self) -> int:
        """Routed experts of each mixture-of-experts layer; 0 for a dense model."""
        return max((layer.moe.num_experts for layer in self.layers if layer.moe), default=0)


def kv_groups(config: ModelConfig) -> tuple[KvGroupConfig, ...]:
    """Divide the layers into KV groups of equally many layers, so that one pool of equal blocks serves all.

    The size of a group is the greatest common divisor of the numbers of full and of chunked layers; groups of full
    layers come first. A model without chunked layers is one group.
    """
    full = [i for i, layer in enumerate(config.layers) if layer.chunk_size is None]
    chunked = [i for i, layer in enumerate(config.layers) if layer.chunk_size is not None]
    size = math.gcd(len(full), len(chunked))
    groups: list[KvGroupConfig] = []
    for members in (full, chunked):
        for start in range(0, len(members), size):
            layers = tuple(members[start : start + size])
            groups.append(KvGroupConfig(layers, config.layers[layers[0]].chunk_size))
    return tuple(groups)


def num_local_kv_heads(config: ModelConfig, parallel: ParallelConfig) -> int:
    """KV heads on each rank; where there are more ranks than KV heads, each head is on tp / num_kv_heads of them."""
    return max(1, config.num_kv_heads // parallel.tp)


def validate_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises LayoutError, naming the numbers, where ``model`` cannot be divided as ``parallel`` says, or where this
    version does not serve such a layout."""
    for name in ("pp", "dp"):
        if getattr(parallel, name) > 1:
            raise LayoutError(f"{name}={getattr(parallel, name)} is not supported yet; use {name}=1 and a larger tp")
    validate_division(model, parallel)


def validate_division(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises LayoutError, naming the numbers, where ``model`` cannot be divided as ``parallel`` says."""
    tp, ep = parallel.tp, parallel.ep
    if parallel.pp > model.num_layers:
        raise LayoutError(f"pp={parallel.pp} is more than the model's {model.num_layers} layers")
    if model.num_heads % tp:
        raise LayoutError(f"tp={tp} does not divide the model's {model.num_heads} attention heads")
    if max(tp, model.num_kv_heads) % min(tp, model.num_kv_heads):
        raise LayoutError(
            f"tp={tp} does not suit the model's {model.num_kv_heads} key-value heads: one must divide the other"
        )
    if ep > 1 and not model.num_experts:
        raise LayoutError(f"ep={ep} needs a mixture of experts; {model.architecture} here is dense, use ep=1")
    if ep > 1 and model.num_experts % ep:
        raise LayoutError(f"ep={ep} does not divide the model's {model.num_experts} experts")
    for layer in model.layers:
        # The shared expert is as wide as a routed one and is divided over all tp ranks.
        width = layer.moe.intermediate_size if layer.moe else layer.intermediate_size
        if width % tp:
            raise LayoutError(f"tp={tp} does not divide the feed-forward width {width}")
        if layer.moe and width % parallel.expert_tp:
            raise LayoutError(f"tp / ep = {parallel.expert_tp} does not divide the experts' width {width}")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _parse_fields(architecture: str, text: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    if (act := text.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"config.json asks for activation {act!r}; only 'silu' is served")
    num_heads = int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or text["hidden_size"] // num_heads)
    is_llama4 = architecture.startswith("Llama4")
    bos = _token_ids(generation, "bos_token_id") + _token_ids(text, "bos_token_id")
    eos = _token_ids(generation, "eos_token_id") + _token_ids(text, "eos_token_id")
    return {
        "vocab_size": int(text["vocab_size"]),
        "hidden_size": int(text["hidden_size"]),
        "num_heads": num_heads,
        "num_kv_heads": int(text.get("num_key_value_heads") or num_heads),
        "head_dim": head_dim,
        "layers": _LAYER_PARSERS[architecture](text),
        "rope": parse_rope(text, head_dim, 500000.0 if is_llama4 else 10000.0, interleaved=is_llama4),
        "rms_norm_eps": float(text.get("rms_norm_eps", 1e-5 if is_llama4 else 1e-6)),
        "max_position_embeddings": int(text["max_position_embeddings"]),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "attention_bias": bool(text.get("attention_bias", False)),
        "mlp_bias": bool(text.get("mlp_bias", False)) and not is_llama4,
        "dtype": _dtype(text),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": tuple(dict.fromkeys(eos)),
        "tensor_prefix": "language_model." if architecture == "Llama4ForConditionalGeneration" else "",
    }


def _dtype(text: Mapping[str, Any]) -> Dtype:
    """float16 checkpoints (Llama 2) are served in bfloat16: float16 is not a format of the engine."""
    name = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    return Dtype.FLOAT32 if name == "float32" else Dtype.BFLOAT16


def _token_ids(source: Mapping[str, Any], key: str) -> list[int]:
    value = source.get(key)
    if value is None:
        return []
    return [int(token_id) for token_id in value] if isinstance(value, list) else [int(value)]


def _llama_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    return (LayerConfig(intermediate_size=int(text["intermediate_size"])),) * int(text["num_hidden_layers"])


def _llama4_layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
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
    chunk_size = text.get("attention_chunk_size", 8192)
    temperature = None
    if text.get("attn_temperature_tuning", True):
        temperature = TemperatureConfig(float(text.get("floor_scale", 8192)), float(text.get("attn_scale", 0.1)))
    moe = MoeConfig(
        num_experts=int(text.get("num_local_experts") or 0),
        num_experts_per_token=int(text.get("num_experts_per_tok", 1)),
        intermediate_size=int(text["intermediate_size"]),
    )
    if len(rope_flags) != count or len(kinds) != count:
        raise CheckpointError(f"config.json: no_rope_layers and layer_types must have {count} entries, one a layer")
    return tuple(
        LayerConfig(
            intermediate_size=int(text["intermediate_size_mlp"]),
            use_rope=bool(rope_flags[i]),
            chunk_size=int(chunk_size) if chunk_size and kinds[i] == chunked else None,
            qk_norm=bool(text.get("use_qk_norm", True)) and bool(rope_flags[i]),
            temperature=None if rope_flags[i] else temperature,
            moe=moe if i in moe_layers and moe.num_experts else None,
        )
        for i in range(count)
    )


_LAYER_PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[LayerConfig, ...]]] = {
    "LlamaForCausalLM": _llama_layers,
    "Llama4ForCausalLM": _llama4_layers,
    "Llama4ForConditionalGeneration": _llama4_layers,
}
