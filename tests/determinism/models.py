"""Random checkpoints for deterministic mode: the shapes of Llama 3, Llama 4 and Mixtral in small. Sizes suit the CPU's
tile units, so that these are used where there are any; ``odd`` ones suit nothing."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.determinism.ways import VOCAB_SIZE
from tests.parity.architectures import randomize

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "rope_parameters": _ROPE,
}
_LLAMA4: dict[str, Any] = _COMMON | {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 512,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 32,
    "attn_scale": 1.0,
    "floor_scale": 16,
    "pad_token_id": None,
}
_MIXTRAL = _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48}
_DYNAMIC = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
}
_ODD = {"hidden_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18, "intermediate_size": 100}


def _configs() -> dict[str, transformers.PretrainedConfig]:
    return {
        "Llama 3": transformers.LlamaConfig(**_COMMON | {"rope_parameters": _SCALED_ROPE}),
        "Llama, dynamic rope": transformers.LlamaConfig(**_COMMON | _DYNAMIC),
        "Llama 4": transformers.Llama4TextConfig(**_LLAMA4),
        "Mixtral": transformers.MixtralConfig(**_MIXTRAL),
        "Llama 3, odd": transformers.LlamaConfig(**_COMMON | _ODD),
        "Mixtral, odd": transformers.MixtralConfig(**_MIXTRAL | _ODD),
    }


_CLASSES: dict[type, Any] = {
    transformers.LlamaConfig: transformers.LlamaForCausalLM,
    transformers.Llama4TextConfig: transformers.Llama4ForCausalLM,
    transformers.MixtralConfig: transformers.MixtralForCausalLM,
}
MODELS = tuple(_configs())


def save_model(name: str, directory: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of the model ``name`` in a directory of its own below ``directory``."""
    target = directory / f"{name} {dtype}".replace(" ", "-").replace(",", "")
    if target.exists():
        return target
    torch.manual_seed(len(name))
    config = _configs()[name]
    model = _CLASSES[type(config)]._from_config(config)
    randomize(model)
    model.to(dtype).save_pretrained(target)
    config_file = target / "config.json"
    content = json.loads(config_file.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    config_file.write_text(json.dumps(content))
    return target
