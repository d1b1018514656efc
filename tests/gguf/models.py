"""Tiny models as GGUF files, and the same models in transformers with the weights that the gguf package decodes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from tests.gguf.files import random_blocks, write_gguf
from tests.parity.architectures import continue_greedily, prompts, randomize
from tests.parity.reference import NUM_NEW
from tests.support.model_driver import Generated

VOCAB_SIZE = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
_SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}

Kinds = Callable[[str], str]
"""From a Hugging Face tensor's name to the format that it is written in."""


def _all(kind: str) -> Kinds:
    return lambda name: "F32" if "norm" in name or name.endswith(".bias") or "gate.weight" in name else kind


def q4_k_m(name: str) -> str:
    """As llama.cpp mixes: values and down projections of half of the layers, and the head, have more bits."""
    if "norm" in name:
        return "F32"
    if name == "lm_head.weight" or re.search(r"layers\.0\..*(v_proj|down_proj)", name):
        return "Q6_K"
    return "Q4_K"


def _mixed(name: str) -> str:
    return "Q5_K" if "down_proj" in name or "embed" in name else q4_k_m(name)


@dataclass(frozen=True)
class Case:
    """``architecture``: GGUF's name. ``weights``: for the table of conformance."""

    architecture: str
    config: transformers.PretrainedConfig
    kinds: Kinds
    weights: str


WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
CASES: Mapping[str, Case] = {
    "q8": Case("llama", transformers.LlamaConfig(**COMMON | _SMALL, intermediate_size=128), _all("Q8_0"), "GGUF Q8_0"),
    "q4_k_m": Case(
        "llama", transformers.LlamaConfig(**COMMON | WIDE, intermediate_size=512), q4_k_m, "GGUF Q4_K + Q6_K"
    ),
    "llama3.1-tied": Case(
        "llama",
        transformers.LlamaConfig(
            **COMMON | WIDE | {"rope_parameters": _LLAMA3}, intermediate_size=512, tie_word_embeddings=True
        ),
        _mixed,
        "GGUF Q4_K + Q5_K, tied",
    ),
    "biases-f16": Case(
        "llama",
        transformers.LlamaConfig(**COMMON | _SMALL, intermediate_size=96, attention_bias=True, mlp_bias=True),
        _all("F16"),
        "GGUF F16",
    ),
    "mixtral": Case(
        "llama",
        transformers.MixtralConfig(
            **COMMON | _SMALL, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        ),
        _all("Q8_0"),
        "GGUF Q8_0",
    ),
    "qwen3": Case(
        "qwen3", transformers.Qwen3Config(**COMMON | _SMALL, intermediate_size=128), _all("Q4_0"), "GGUF Q4_0"
    ),
    "qwen3-moe": Case(
        "qwen3moe",
        transformers.Qwen3MoeConfig(
            **COMMON | _SMALL,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        _all("BF16"),
        "GGUF BF16",
    ),
}


@dataclass(frozen=True)
class Reference:
    """A file, and what transformers computes with its decoded weights, which are in ``directory`` too."""

    path: Path
    directory: Path
    prompts: list[list[int]]
    generated: list[Generated]


def make_reference(
    name: str, folder: Path, case: Case | None = None, more: Mapping[str, Any] | None = None
) -> Reference:
    """``case``: by default that of CASES. ``more``: metadata besides the model's own."""
    case = case or CASES[name]
    directory = folder / name
    torch.manual_seed(len(name))
    made = transformers.AutoModelForCausalLM.from_config(case.config)
    randomize(made)
    made.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    tensors, decoded = _encode(case, weights, np.random.default_rng(len(name)))
    save_file(decoded, directory / "model.safetensors", {"format": "pt"})
    if case.config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = ("F32", _rope_factors(case.config))
    path = folder / f"{name}.gguf"
    write_gguf(path, case.architecture, {**metadata(case.architecture, case.config), **(more or {})}, tensors)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return Reference(path, directory, prompts(), [continue_greedily(oracle, p, NUM_NEW) for p in prompts()])


def metadata(architecture: str, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if num_experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        values |= {"expert_count": num_experts, "expert_used_count": config.num_experts_per_tok}
        if architecture == "qwen3moe":
            values["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _rope_factors(config: Any) -> np.ndarray[Any, Any]:
    """By what each frequency is divided, as llama.cpp's converter writes it: from transformers' own frequencies."""
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    return np.asarray(plain / init(config, torch.device("cpu"))[0].double().numpy())


def _encode(
    case: Case, weights: Mapping[str, Any], generator: np.random.Generator
) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
    """GGUF's tensors, and by Hugging Face's names the float32 values that they stand for."""
    names = gguf.get_tensor_name_map(
        MODEL_ARCH[{"llama": "LLAMA", "qwen3": "QWEN3", "qwen3moe": "QWEN3MOE"}[case.architecture]],
        case.config.num_hidden_layers,
    )
    tensors: dict[str, tuple[str, Any]] = {}
    decoded: dict[str, Any] = {}
    stacks: dict[str, dict[int, tuple[str, Any]]] = {}
    for name, values in weights.items():
        kind = case.kinds(name)
        order = np.arange(len(values))
        if case.architecture == "llama" and re.search(r"self_attn\.[qk]_proj", name):
            # As in llama.cpp's converter.
            order = order.reshape(-1, 2, case.config.head_dim // 2).swapaxes(1, 2).reshape(-1)
        deviation = 0.06 if ".layers." in name else 0.1
        data, floats = _quantized(kind, values.astype(np.float32)[order], generator, deviation)
        decoded[name] = np.empty_like(floats)
        decoded[name][order] = floats
        expert = re.search(r"(.*\.experts)\.(\d+)\.(.+)\.weight", name)
        if expert is None:
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = (kind, data)
        else:
            stacked = names.get_name(f"{expert[1]}.{expert[3]}.weight", try_suffixes=(".weight",))
            stacks.setdefault(stacked, {})[int(expert[2])] = (kind, data)
    for name, parts in stacks.items():
        tensors[name] = (parts[0][0], np.stack([parts[number][1] for number in sorted(parts)]))
    return tensors, decoded


def _quantized(kind: str, values: Any, generator: np.random.Generator, deviation: float) -> tuple[Any, Any]:
    """What to write, and what it stands for. K types cannot be encoded: there the values are new ones, of the standard
    ``deviation``."""
    number = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return values, values.astype({"F32": np.float32, "F16": np.float16}[kind]).astype(np.float32)
    if kind.endswith("_K"):
        data = random_blocks(kind, values.shape, generator, deviation)
    else:
        data = gguf.quants.quantize(values, number)
    return data if kind != "BF16" else values, gguf.quants.dequantize(data, number)
