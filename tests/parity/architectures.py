"""Tiny random checkpoints of every served architecture, and what transformers computes with them.

Chunk, temperature floor and original context are at most 32, so that prompts and decoding cross their borders.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.model_driver import Generated

VOCAB_SIZE = 97
"""Odd, so that no number of ranks divides it."""
NUM_NEW = 14
PROMPT_LENGTHS = (5, 21, 38)
"""The shortest crosses borders in decode, the others in prefill as well."""

_COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.2}
_LLAMA = _COMMON | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA4 = _COMMON | {
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


def _rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_SCALED = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_SCOUT = _rope("llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=16)

CONFIGS: Mapping[str, transformers.PretrainedConfig] = {
    "llama2": transformers.LlamaConfig(**_LLAMA),
    "llama3.1": transformers.LlamaConfig(
        **_LLAMA
        | _SCALED
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    ),
    "biases": transformers.LlamaConfig(**_LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "linear": transformers.LlamaConfig(**_LLAMA | _rope("linear", factor=4.0)),
    "dynamic": transformers.LlamaConfig(**_LLAMA | _rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}),
    "yarn": transformers.LlamaConfig(
        **_LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=1.5, beta_slow=0.1)
    ),
    "llama4-scout": transformers.Llama4TextConfig(**_LLAMA4 | _SCOUT | {"interleave_moe_layer_step": 1}),
    "llama4-maverick": transformers.Llama4TextConfig(
        **_LLAMA4 | _rope("default") | {"interleave_moe_layer_step": 2, "use_qk_norm": False}
    ),
    "llama4-top2": transformers.Llama4TextConfig(
        **_LLAMA4 | _rope("default") | {"num_experts_per_tok": 2, "attention_bias": True}
    ),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and the oracle's greedy continuation of some prompts."""

    directory: Path
    prompts: list[list[int]]
    generated: list[Generated]


def make_reference(name: str, directory: Path) -> Reference:
    """Save a random checkpoint of CONFIGS[name] and run it in float32."""
    config = CONFIGS[name]
    torch.manual_seed(len(name))
    is_llama4 = isinstance(config, transformers.Llama4TextConfig)
    model_class = transformers.Llama4ForCausalLM if is_llama4 else transformers.LlamaForCausalLM
    model = model_class._from_config(config, attn_implementation="eager").eval()
    randomize(model)
    model.save_pretrained(directory)
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
