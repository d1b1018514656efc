"""What a checkpoint's config.json says of its model, in the engine's own words. Torch-free.

Both forms in circulation are read: that of transformers v4 (``rope_theta`` + ``rope_scaling``, ``torch_dtype``) and
that of v5 (``rope_parameters``, ``dtype``, explicit per-layer lists).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from engine.config import Dtype, KvGroupConfig, ParallelConfig
from engine.config_values import check_values, reading_config
from engine.errors import CheckpointError, InvalidOption, LayoutError
from engine.gguf.header import is_gguf
from engine.gguf.model import read_model
from engine.layer_config import (
    LayerConfig,
    llama4_layers,
    llama_layers,
    mistral_layers,
    mixtral_layers,
    qwen3_layers,
    qwen3_moe_layers,
)
from engine.quantization_config import QuantizationConfig, online_quantization, parse_quantization
from engine.rope_config import RopeConfig, RopeType, parse_rope
from engine.stages import divide_layers, num_groups_of_kinds

PLAN_ONLY_ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Phi3ForCausalLM",
)
"""Whose shapes ``remuda plan`` knows, and which are not served."""


@dataclass(frozen=True)
class Architecture:
    """How config.json of one architecture is read, and what transformers assumes where it is silent.

    ``head_dim``: None for hidden_size / num_heads. ``interleaved_rope``: see RopeConfig. ``tensor_prefix``,
    ``skipped_prefixes``: see ModelConfig.
    """

    parse_layers: Callable[[Mapping[str, Any]], tuple[LayerConfig, ...]]
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 2048
    head_dim: int | None = None
    interleaved_rope: bool = False
    has_mlp_bias: bool = False
    tensor_prefix: str = ""
    skipped_prefixes: tuple[str, ...] = ()


_LLAMA4 = Architecture(llama4_layers, 500000.0, 1e-5, max_positions=131072, head_dim=128, interleaved_rope=True)
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(llama_layers, has_mlp_bias=True),
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": replace(
        _LLAMA4, tensor_prefix="language_model.", skipped_prefixes=("vision_model.", "multi_modal_projector.")
    ),
    "MistralForCausalLM": Architecture(mistral_layers, max_positions=131072),
    "MixtralForCausalLM": Architecture(mixtral_layers, 1e6, 1e-5, max_positions=131072),
    "Qwen3ForCausalLM": Architecture(qwen3_layers, max_positions=32768, head_dim=128),
    "Qwen3MoeForCausalLM": Architecture(qwen3_moe_layers, max_positions=32768),
}
"""What is served, by the name in config.json."""
_OLD_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""Names of the first conversions."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    ``tensor_prefix`` stands before the names of all its tensors in the checkpoint. ``skipped_prefixes``: of tensors
    that the checkpoint also has and that are not read, for only text is served; empty where there are none.
    """

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
    skipped_prefixes: tuple[str, ...] = ()
    quantization: QuantizationConfig | None = None

    @classmethod
    def from_directory(cls, path: str | Path, quantization: str | None = None) -> Self:
        """Read config.json, and generation_config.json where there is one; of a GGUF file, its metadata.
        ``quantization``: int8, int4 or fp8 to quantize a float checkpoint while loading it.

        Raises CheckpointError where config.json is missing, broken, or of a model that is not served; InvalidOption
        where ``quantization`` is unknown or the checkpoint is quantized already.
        """
        model = cls._from_gguf(path) if is_gguf(path) else cls._from_files(Path(path))
        return model if quantization is None else model.quantized(quantization)

    @classmethod
    def _from_files(cls, directory: Path) -> Self:
        config = _read_json(directory / "config.json")
        if config is None:
            raise CheckpointError(f"{directory} has no config.json; name a directory in Hugging Face form")
        return cls.from_hf(config, _read_json(directory / "generation_config.json"))

    @classmethod
    def _from_gguf(cls, path: str | Path) -> Self:
        found = read_model(path)
        model = cls.from_hf(found.config)
        rope = replace(model.rope, frequency_divisors=found.rope_divisors)
        return replace(model, quantization=found.quantization, rope=rope)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> Self:
        """As ``from_directory``, from the files' contents."""
        check_values(config)
        check_values(generation_config or {}, "generation_config.json")
        name = str(next(iter(config.get("architectures") or [config.get("model_type")])))
        name = _OLD_NAMES.get(name, name)
        if name not in ARCHITECTURES:
            raise CheckpointError(_refusal(name))
        # Llama 4 with vision nests its text model; the vision part is not read.
        text = {**config, **(config.get("text_config") or {})}
        check_values(text)
        with reading_config(name):
            scheme = text.get("quantization_config")
            quantization = parse_quantization(scheme) if scheme else None
            fields = _parse_fields(ARCHITECTURES[name], text, generation_config or {})
            return cls(architecture=name, quantization=quantization, **fields)

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
    def notice(self) -> str | None:
        """For people: what the checkpoint has and is not served. None: nothing."""
        if not self.skipped_prefixes:
            return None
        tensors = ", ".join(f"{prefix}*" for prefix in self.skipped_prefixes)
        return f"only text is served; the checkpoint's vision tensors ({tensors}) are skipped"

    @property
    def num_experts(self) -> int:
        """Routed experts of each mixture-of-experts layer; 0 for a dense model."""
        return max((layer.moe.num_experts for layer in self.layers if layer.moe), default=0)


def stage_layers(config: ModelConfig, pp: int) -> tuple[range, ...]:
    """The layers of each of ``pp`` pipeline stages: neighbours, so many that stages hold about equally many weights,
    the embedding (in the first) and the head (in the last) among them."""
    vocabulary = config.vocab_size * config.hidden_size
    return divide_layers(tuple(_num_weights(config, layer) for layer in config.layers), vocabulary, vocabulary, pp)


def _num_weights(config: ModelConfig, layer: LayerConfig) -> int:
    """Of a layer's matrices."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    width = layer.intermediate_size
    if layer.moe is not None:
        width = layer.moe.intermediate_size * (layer.moe.num_experts + layer.moe.has_shared_expert)
    return config.hidden_size * (attention + 3 * width)


def kv_groups(config: ModelConfig, pp: int = 1, without: frozenset[int] = frozenset()) -> tuple[KvGroupConfig, ...]:
    """Divide the layers into KV groups, so that one pool of equal blocks serves all on each rank.

    All layers of a group are of one kind (full, chunked, sliding), and a kind's groups have equally many layers in each
    of ``pp`` pipeline stages, as far as they can; groups of full layers come first. A model with layers of one kind is
    one group. ``without``: layers that keep nothing.
    """
    full = (None, None)
    kinds: dict[tuple[int | None, int | None], None] = {full: None}
    stages: list[dict[tuple[int | None, int | None], list[int]]] = []
    for layers in stage_layers(config, pp):
        stages.append({})
        for i in layers:
            if i not in without:
                kind = (config.layers[i].chunk_size, config.layers[i].window_size)
                kinds.setdefault(kind)
                stages[-1].setdefault(kind, []).append(i)
    counts = [[len(stage.get(kind, ())) for kind in kinds] for stage in stages]
    groups = []
    for kind, num_groups in zip(kinds, num_groups_of_kinds(counts), strict=True):
        for g in range(num_groups):
            members = [stage.get(kind, []) for stage in stages]
            own = [m[len(m) * g // num_groups : len(m) * (g + 1) // num_groups] for m in members]
            groups.append(KvGroupConfig(tuple(i for part in own for i in part), *kind))
    return tuple(groups)


def num_local_kv_heads(config: ModelConfig, parallel: ParallelConfig) -> int:
    """KV heads on each rank; where there are more ranks than KV heads, each head is on tp / num_kv_heads of them."""
    return max(1, config.num_kv_heads // parallel.tp)


def validate_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises LayoutError, naming the numbers, where ``model`` cannot be divided as ``parallel`` says."""
    tp, ep = parallel.tp, parallel.ep
    if parallel.pp > model.num_layers:
        raise LayoutError(f"pp={parallel.pp} is more than the model's {model.num_layers} layers; every stage needs one")
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
    if parallel.num_expert_slots(model.num_experts) > model.num_experts:
        raise LayoutError(
            f"num-redundant-experts={parallel.num_redundant_experts} is more than ep={ep} ranks can use: with "
            f"{model.num_experts * (ep - 1)} each holds all {model.num_experts} experts"
        )
    for layer in model.layers:
        if layer.moe is None or layer.moe.has_shared_expert:
            # The shared expert is as wide as a routed one and is divided over all tp ranks.
            width = layer.moe.intermediate_size if layer.moe else layer.intermediate_size
            if width % tp:
                raise LayoutError(f"tp={tp} does not divide the feed-forward width {width}")
        if layer.moe and layer.moe.intermediate_size % parallel.expert_tp:
            raise LayoutError(
                f"dp × tp / ep = {parallel.dp} × {tp} / {ep} = {parallel.expert_tp} does not divide the experts' width "
                f"{layer.moe.intermediate_size}"
            )


def _refusal(name: str) -> str:
    served = f"served are {', '.join(sorted(ARCHITECTURES))}"
    if name in PLAN_ONLY_ARCHITECTURES:
        return f"{name} is not served: remuda plan knows its shapes; serving comes later; {served}"
    return f"config.json names architecture {name!r}; {served}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _parse_fields(
    architecture: Architecture, given: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any]:
    if (act := given.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"config.json asks for activation {act!r}; only 'silu' is served")
    # Early Llama 1 conversions have max_sequence_length.
    lengths = (given.get("max_position_embeddings"), given.get("max_sequence_length"), architecture.max_positions)
    text = {**given, "max_position_embeddings": int(next(filter(None, lengths)))}
    num_heads = int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or architecture.head_dim or text["hidden_size"] // num_heads)
    if head_dim < 1 or head_dim % 2:
        raise CheckpointError(f"config.json: heads of {head_dim} channels; the rotary embedding needs an even number")
    layers = architecture.parse_layers(text)
    num_experts = max((layer.moe.num_experts for layer in layers if layer.moe), default=0)
    if 0 < num_experts < text.get("num_experts_per_tok", 0):
        raise CheckpointError(f"config.json: a token sees {text['num_experts_per_tok']} of {num_experts} experts")
    bos = _token_ids(generation, "bos_token_id") + _token_ids(text, "bos_token_id")
    eos = _token_ids(generation, "eos_token_id") + _token_ids(text, "eos_token_id")
    return {
        "vocab_size": int(text["vocab_size"]),
        "hidden_size": int(text["hidden_size"]),
        "num_heads": num_heads,
        "num_kv_heads": int(text.get("num_key_value_heads") or num_heads),
        "head_dim": head_dim,
        "layers": layers,
        "rope": parse_rope(text, head_dim, architecture.rope_theta, architecture.interleaved_rope),
        "rms_norm_eps": float(text.get("rms_norm_eps", architecture.rms_norm_eps)),
        "max_position_embeddings": text["max_position_embeddings"],
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "attention_bias": bool(text.get("attention_bias", False)),
        "mlp_bias": architecture.has_mlp_bias and bool(text.get("mlp_bias", False)),
        "dtype": _dtype(text),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": tuple(dict.fromkeys(eos)),
        "tensor_prefix": architecture.tensor_prefix,
        "skipped_prefixes": architecture.skipped_prefixes,
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
