"""Tiny base models and LoRA adapters for them, made by PEFT, and what transformers and PEFT compute with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from tests.lora.mixed import Adapted

VOCAB_SIZE = 97
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LLAMA4_EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
_MIXTRAL_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA = transformers.LlamaConfig(
    **_COMMON, num_attention_heads=8, num_key_value_heads=2, head_dim=16, intermediate_size=96
)
_LLAMA4 = transformers.Llama4TextConfig(
    **_COMMON,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    intermediate_size_mlp=80,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    attention_chunk_size=8,
    pad_token_id=None,
)
_MIXTRAL = transformers.MixtralConfig(
    **_COMMON,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=None,
)


@dataclass(frozen=True)
class Base:
    """A configuration, and what two adapters of its model are made with."""

    model_class: type[transformers.PreTrainedModel]
    config: transformers.PretrainedConfig
    adapters: tuple[Mapping[str, Any], Mapping[str, Any]]


BASES = {
    # All linear layers; and few, of other ranks, with rank-stabilised scales.
    "llama": Base(
        transformers.LlamaForCausalLM,
        _LLAMA,
        (
            {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR},
            {
                "r": 6,
                "lora_alpha": 5,
                "use_rslora": True,
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 9},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 2},
            },
        ),
    ),
    "llama4": Base(
        transformers.Llama4ForCausalLM,
        _LLAMA4,
        (
            {"r": 3, "lora_alpha": 4, "target_modules": _LINEAR, "target_parameters": _LLAMA4_EXPERTS},
            {
                "r": 5,
                "lora_alpha": 20,
                "use_rslora": True,
                "target_modules": [],
                "target_parameters": _LLAMA4_EXPERTS[1:],
            },
        ),
    ),
    "mixtral": Base(
        transformers.MixtralForCausalLM,
        _MIXTRAL,
        (
            {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": _MIXTRAL_EXPERTS},
            {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": _MIXTRAL_EXPERTS[:1]},
        ),
    ),
}


def make_adapted(name: str, directory: Path) -> Adapted:
    made = BASES[name]
    torch.manual_seed(11)
    base = directory / "base"
    model = made.model_class._from_config(made.config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(base)
    return adapt(base, directory, made.adapters)


def adapt(base: Path, directory: Path, adapters: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Adapted:
    """Two adapters of ``base`` in ``directory``, and what PEFT computes with them."""
    paths = (directory / "first", directory / "second")
    for path, options in zip(paths, adapters, strict=True):
        make_adapter(base, path, **options)
    generator = torch.Generator().manual_seed(5)
    texts: dict[int | None, list[int]] = {
        which: torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        for which, length in ((None, 26), (0, 17), (1, 21))
    }
    logits = {
        which: oracle_logits(base, None if which is None else paths[which], text) for which, text in texts.items()
    }
    for which, text in texts.items():
        changed = np.abs(logits[which] - oracle_logits(base, None, text)).mean()
        assert which is None or changed > 0.3, f"adapter {which} of {base} changes too little to be tested by"
    return Adapted(base, paths, texts, logits)


def load_base(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def make_adapter(base: Path, directory: Path, **options: Any) -> None:
    """Random, and of some effect."""
    model = peft.get_peft_model(load_base(base), peft.LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)


@torch.no_grad()
def oracle_logits(base: Path, adapter: Path | None, token_ids: list[int]) -> np.ndarray:
    model = load_base(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return np.asarray(model(torch.tensor([token_ids])).logits[0])


@torch.no_grad()
def oracle_embedding(base: Path, adapter: Path | None, token_ids: list[int]) -> np.ndarray:
    """The mean of the hidden states behind the final norm, of length 1."""
    model = load_base(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    mean = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
    return np.asarray(mean / mean.norm())
