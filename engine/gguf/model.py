"""A GGUF file's metadata as the config.json that the model was converted from. Torch-free.

Served are the architectures ``llama`` (Llama 1 to 3, Mistral and, with experts, Mixtral), ``qwen3`` and ``qwen3moe``.

Llama 3.1's stretched frequencies come as a tensor, ``rope_freqs.weight``: by how much each is divided. It is used as it
is, because its parameters (factor, low and high, original context) do not stand in the file.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.gguf.header import GgufHeader, read_header
from engine.gguf.names import NamedTensor, named_tensors, quantized_modules
from engine.gguf.special_tokens import stop_ids, token_id
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat

_ARCHITECTURES = ("llama", "qwen3", "qwen3moe")
_DIVISORS = "rope_freqs.weight"
_PLAIN_YARN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.1}
"""What llama.cpp may scale YaRN by, and the values at which nothing but YaRN itself is left."""


@dataclass(frozen=True)
class GgufModel:
    """``config``: in config.json's words. ``rope_divisors``: of the frequencies, [head_dim / 2], or empty.
    ``tensors``: by Hugging Face's names."""

    header: GgufHeader
    config: Mapping[str, Any]
    quantization: QuantizationConfig | None
    rope_divisors: tuple[float, ...]
    tensors: Mapping[str, NamedTensor]


def read_model(path: str | Path) -> GgufModel:
    """Raises CheckpointError, naming the file, where it is broken or of a model that is not served."""
    header = read_header(path)
    facts = _Facts(header)
    head_dim = facts.head_dim
    tensors = named_tensors(header, facts.architecture, head_dim)
    types = quantized_modules(tensors)
    quantization = None
    if types:
        formats = {name: MatrixFormat(WeightFormat.GGUF, gguf_type=kind) for name, kind in types.items()}
        kinds = ", ".join(sorted(set(types.values())))
        quantization = QuantizationConfig(f"{kinds} (GGUF)", (), by_name=formats)
    return GgufModel(header, _config(facts, tensors), quantization, _rope_divisors(header, head_dim), tensors)


class _Facts:
    """Typed look-ups in the metadata, below the architecture's name."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.metadata = header.metadata
        self.architecture = str(header.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{header.path} is of the architecture {self.architecture!r}; of GGUF files, those of "
                f"{', '.join(_ARCHITECTURES)} are served. Other models are served from safetensors"
            )
        if int(header.metadata.get("split.count", 1)) > 1:
            raise CheckpointError(
                f"{header.path} is one of {header.metadata['split.count']} parts; "
                "join them with llama.cpp's llama-gguf-split --merge and serve the one file"
            )

    def get(self, key: str) -> Any:
        """None where it is not there."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or value < 1:
            what = "is missing" if value is None else f"is {value!r}, not one positive number"
            raise CheckpointError(f"{self._header.path}: {self.architecture}.{key} {what}")
        return value

    @property
    def head_dim(self) -> int:
        key_length = self.get("attention.key_length")
        if key_length is None:
            return self.integer("embedding_length") // self.integer("attention.head_count")
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.get(key) not in (None, key_length):
                raise self.refused(f"{key} {self.get(key)} with attention.key_length {key_length}")
        return self.integer("attention.key_length")

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._header.path} asks for {what}, which is not served")


def _config(facts: _Facts, tensors: Mapping[str, NamedTensor]) -> dict[str, Any]:
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{facts._header.path} has no tensor 'token_embd.weight'")
    num_heads = facts.integer("attention.head_count")
    is_float32 = all(part.tensor.type.name == "F32" for part in tensors.values())
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": facts.integer("embedding_length"),
        "num_hidden_layers": facts.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv")
        if facts.get("attention.head_count_kv") is not None
        else num_heads,
        "head_dim": facts.head_dim,
        "intermediate_size": facts.integer("feed_forward_length"),
        "max_position_embeddings": facts.integer("context_length"),
        "rms_norm_eps": float(facts.get("attention.layer_norm_rms_epsilon") or 1e-5),
        "rope_parameters": _rope(facts),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
        "dtype": "float32" if is_float32 else "bfloat16",
        "bos_token_id": token_id(facts.metadata, "bos"),
        "eos_token_id": list(stop_ids(facts.metadata)) or None,
    }
    return config | _architecture(facts)


def _architecture(facts: _Facts) -> dict[str, Any]:
    num_experts = int(facts.get("expert_count") or 0)
    if facts.architecture == "qwen3":
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if facts.architecture == "llama" and not num_experts:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": facts.integer("expert_used_count")}
    if facts.architecture == "llama":
        return experts | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
    width = facts.integer("expert_feed_forward_length")
    # llama.cpp always divides by the sum; no released Qwen3 mixture does otherwise.
    return experts | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": num_experts,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _rope(facts: _Facts) -> dict[str, Any]:
    kind = facts.get("rope.scaling.type")
    factor = facts.get("rope.scaling.factor") or facts.get("rope.scale_linear")
    rope = {"rope_theta": float(facts.get("rope.freq_base") or 10000.0)}
    if kind in (None, "none") and factor in (None, 0.0, 1.0):
        return rope | {"rope_type": "default"}
    if kind in (None, "linear"):
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise facts.refused(f"rope.scaling.type {kind!r}")
    for key, plain in _PLAIN_YARN.items():
        value = facts.get(f"rope.scaling.{key}")
        if value is not None and abs(value - plain) > 1e-6:
            raise facts.refused(f"rope.scaling.{key} {value}")
    return rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": facts.integer("rope.scaling.original_context_length"),
        "beta_fast": facts.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": facts.get("rope.scaling.yarn_beta_slow"),
    }


def _rope_divisors(header: GgufHeader, head_dim: int) -> tuple[float, ...]:
    tensor = header.tensors.get(_DIVISORS)
    if tensor is None:
        return ()
    count = head_dim // 2
    if tensor.type_number != 0 or tensor.shape != (count,):
        raise CheckpointError(f"{header.path}: {_DIVISORS} must hold {count} F32 values, one for each frequency")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        values: tuple[float, ...] = struct.unpack(f"<{count}f", file.read(4 * count))
    if not all(0 < value < float("inf") for value in values):
        raise CheckpointError(f"{header.path}: {_DIVISORS} holds values that are not positive numbers")
    return values
