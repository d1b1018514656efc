"""Tiny random checkpoints of every served architecture, and what transformers computes with them.

Chunk, window, temperature floor and original context are at most 32, so that prompts and decoding cross their borders.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.parity.reference import NUM_NEW, Reference
from tests.support.model_driver import Generated

VOCAB_SIZE = 97
"""Odd, so that no number of ranks divides it."""
PROMPT_LENGTHS = (5, 21, 38)
"""The shortest crosses borders in decode, the others in prefill as well."""

Layout = tuple[int, int]
"""(tp, ep)"""
DENSE_LAYOUTS: tuple[Layout, ...] = ((1, 1), (2, 1), (4, 1))
MOE_LAYOUTS: tuple[Layout, ...] = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
"""The mixtures below have four experts."""

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.2}
_LLAMA: dict[str, Any] = _COMMON | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
GROUPED: dict[str, Any] = _LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
_MIXTURE: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2, "num_local_experts": 4}
LLAMA4: dict[str, Any] = _COMMON | {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "max_position_embeddings": 256,
    "attention_chunk_size": 8,
    "floor_scale": 8,
    # The hub's value, 0.1, changes little over so few positions.
    "attn_scale": 1.0,
    "pad_token_id": None,
}
_GUARD4: dict[str, Any] = LLAMA4 | {
    "num_local_experts": 0,
    "moe_layers": [],
    # transformers cannot do without chunks; as long as any text, they change nothing.
    "attention_chunk_size": 256,
    "no_rope_layers": [1, 1, 1, 1],
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


SCALED = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SCOUT = rope("llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=16)


def _with_vision(**text: Any) -> transformers.Llama4Config:
    text_config = transformers.Llama4TextConfig(**text)
    return transformers.Llama4Config(vision_config=_VISION, text_config=text_config.to_dict())


def _as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers wrote config.json before version 5, and the hub's files have it."""
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    return config | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


def _as_llama1(config: dict[str, Any]) -> dict[str, Any]:
    """Before groups of heads and a choice of theta; one of the first conversions' ways to name the context."""
    config = _as_version_4(config) | {"architectures": ["LLaMAForCausalLM"]}
    config["max_sequence_length"] = config.pop("max_position_embeddings")
    absent = ("num_key_value_heads", "rope_theta", "rope_scaling", "head_dim", "attention_bias", "mlp_bias")
    return {key: value for key, value in config.items() if key not in absent}


def _as_qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    config["num_experts"] = config.pop("num_local_experts")
    return _as_version_4(config)


def _as_guard4(config: dict[str, Any]) -> dict[str, Any]:
    """Null for no chunks, step 0 for no mixtures, no list of layer types."""
    text = _as_version_4(config["text_config"] | {"dtype": config["dtype"]})
    del text["layer_types"]
    return config | {"text_config": text | {"attention_chunk_size": None, "interleave_moe_layer_step": 0}}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    ``title``: for people. ``layouts``: those that are run by default; ``legal_layouts``: all of DENSE_LAYOUTS or
    MOE_LAYOUTS. ``rewrite``: of config.json as transformers 5 saves it, to the form that the hub has.
    """

    title: str
    config: transformers.PretrainedConfig
    layouts: tuple[Layout, ...]
    legal_layouts: tuple[Layout, ...] = DENSE_LAYOUTS
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama1": Architecture("Llama 1", transformers.LlamaConfig(**_LLAMA), ((1, 1), (2, 1)), rewrite=_as_llama1),
    "llama2": Architecture("Llama 2", transformers.LlamaConfig(**_LLAMA), ((1, 1), (4, 1))),
    "codellama": Architecture(
        "Code Llama",
        transformers.LlamaConfig(**GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ((1, 1), (2, 1)),
        rewrite=_as_version_4,
    ),
    "llama3.1": Architecture(
        "Llama 3.1", transformers.LlamaConfig(**GROUPED | SCALED | {"tie_word_embeddings": True}), DENSE_LAYOUTS
    ),
    "biases": Architecture(
        "Llama with biases",
        transformers.LlamaConfig(**_LLAMA | {"attention_bias": True, "mlp_bias": True}),
        ((1, 1), (2, 1)),
    ),
    "linear": Architecture(
        "Llama, linear scaling", transformers.LlamaConfig(**_LLAMA | rope("linear", factor=4.0)), ((1, 1),)
    ),
    "dynamic": Architecture(
        "Llama, dynamic scaling",
        transformers.LlamaConfig(**_LLAMA | rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}),
        ((1, 1), (2, 1)),
    ),
    "yarn": Architecture(
        "Llama, YaRN",
        transformers.LlamaConfig(
            **_LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=1.5, beta_slow=0.1)
        ),
        ((1, 1),),
    ),
    "llama4-scout": Architecture(
        "Llama 4 Scout",
        transformers.Llama4TextConfig(**LLAMA4 | SCOUT | {"interleave_moe_layer_step": 1}),
        ((1, 1), (2, 1), (4, 2)),
        MOE_LAYOUTS,
    ),
    "llama4-maverick": Architecture(
        "Llama 4 Maverick",
        transformers.Llama4TextConfig(
            **LLAMA4 | rope("default") | {"interleave_moe_layer_step": 2, "use_qk_norm": False}
        ),
        ((1, 1), (2, 2), (4, 1)),
        MOE_LAYOUTS,
    ),
    "llama4-top2": Architecture(
        "Llama 4, two experts a token",
        transformers.Llama4TextConfig(**LLAMA4 | rope("default") | {"num_experts_per_tok": 2, "attention_bias": True}),
        ((2, 2),),
        MOE_LAYOUTS,
    ),
    "llama4-vision": Architecture(
        "Llama 4 with vision (text)", _with_vision(**LLAMA4 | SCOUT), ((1, 1), (4, 4)), MOE_LAYOUTS
    ),
    "guard4": Architecture(
        "Llama Guard 4", _with_vision(**_GUARD4 | rope("default")), ((1, 1), (2, 1)), rewrite=_as_guard4
    ),
    "mistral": Architecture(
        "Mistral", transformers.MistralConfig(**GROUPED | {"sliding_window": 8}), DENSE_LAYOUTS, rewrite=_as_version_4
    ),
    "mixtral": Architecture(
        "Mixtral", transformers.MixtralConfig(**_MIXTURE), ((1, 1), (2, 2), (4, 2)), MOE_LAYOUTS, _as_version_4
    ),
    "qwen3": Architecture(
        "Qwen3",
        transformers.Qwen3Config(
            **GROUPED
            | {"num_hidden_layers": 4, "head_dim": 32, "tie_word_embeddings": True}
            | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        ),
        ((1, 1), (4, 1)),
    ),
    "qwen3-moe": Architecture(
        "Qwen3 MoE",
        transformers.Qwen3MoeConfig(
            **_MIXTURE
            | {"num_hidden_layers": 6, "moe_intermediate_size": 48, "norm_topk_prob": True}
            | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
        ),
        ((1, 1), (2, 1), (4, 4)),
        MOE_LAYOUTS,
        _as_qwen3_moe,
    ),
    "qwen3-moe-unnormalized": Architecture(
        "Qwen3 MoE, scores as they are",
        transformers.Qwen3MoeConfig(
            **_MIXTURE
            | {"moe_intermediate_size": 48, "norm_topk_prob": False, "attention_bias": True}
            | {"use_sliding_window": True, "sliding_window": 9}
        ),
        ((1, 1), (4, 2)),
        MOE_LAYOUTS,
    ),
}
"""Every served architecture, by a short name, with the variants of it that take another way through the code."""

MODEL_CLASSES: Mapping[type, Any] = {
    transformers.LlamaConfig: transformers.LlamaForCausalLM,
    transformers.Llama4TextConfig: transformers.Llama4ForCausalLM,
    transformers.Llama4Config: transformers.Llama4ForConditionalGeneration,
    transformers.MistralConfig: transformers.MistralForCausalLM,
    transformers.MixtralConfig: transformers.MixtralForCausalLM,
    transformers.Qwen3Config: transformers.Qwen3ForCausalLM,
    transformers.Qwen3MoeConfig: transformers.Qwen3MoeForCausalLM,
}


def make_reference(name: str, directory: Path) -> Reference:
    """Save a random checkpoint of ARCHITECTURES[name] and run it in float32."""
    torch.manual_seed(len(name))
    return reference_of(ARCHITECTURES[name], directory)


def reference_of(architecture: Architecture, directory: Path) -> Reference:
    """As ``make_reference``, with the weights that the global generator gives."""
    model_class = MODEL_CLASSES[type(architecture.config)]
    model = model_class._from_config(architecture.config, attn_implementation="eager").eval()
    randomize(model)
    model.save_pretrained(directory)
    config_file = directory / "config.json"
    config_file.write_text(json.dumps(architecture.rewrite(json.loads(config_file.read_text()))))
    return Reference(directory, prompts(), [continue_greedily(model, prompt) for prompt in prompts()])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def randomize(model: torch.nn.Module) -> None:
    """Norms and biases start as ones and zeros, which would hide it if they were not applied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.2)


@torch.no_grad()
def continue_greedily(model: Any, prompt: list[int], num_new: int = NUM_NEW) -> Generated:
    """The whole prompt at once, then token by token through transformers' own cache."""
    # Dynamic rotary embedding keeps the frequencies of the longest text seen, until a short one comes.
    model(torch.tensor([[0]]))
    token_ids = list(prompt)
    output = model(torch.tensor([prompt]), use_cache=True)
    logits = [output.logits[0]]
    for _ in range(num_new - 1):
        token_ids.append(int(logits[-1][-1].argmax()))
        output = model(torch.tensor([token_ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    token_ids.append(int(logits[-1][-1].argmax()))
    return Generated(token_ids, torch.cat(logits).numpy())
