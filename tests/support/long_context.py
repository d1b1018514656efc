"""A tiny Llama for 131,072 positions, and what it must answer to prompts that fill them.

Its one layer attends to everything. With one layer, keys and values depend on no other position, so transformers can
fill its cache without the quadratic work, and then compute each greedy token exactly.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import engine.assets

VOCAB_SIZE = 2048
MAX_POSITIONS = 131_072
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_checkpoint(directory: Path) -> LlamaForCausalLM:
    """Random weights in float32, with remuda-tiny's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=0.5,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    assets = Path(engine.assets.__path__[0]) / "remuda-tiny"
    for name in _TOKENIZER_FILES:
        shutil.copy(assets / name, directory / name)
    return model


def make_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random ids, none of them a control token."""
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(0, 2000, num_tokens)]


@torch.inference_mode()
def expected_tokens(model: LlamaForCausalLM, prompt: list[int], num_new: int) -> list[int]:
    """The greedy continuation, by transformers."""
    (layer,) = model.model.layers
    hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor([prompt[:-1]])))
    attention = layer.self_attn
    shape = (1, len(prompt) - 1, -1, attention.head_dim)
    key, value = (project(hidden).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    cos, sin = model.model.rotary_emb(hidden, torch.arange(len(prompt) - 1)[None])
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    cache = DynamicCache(config=model.config)
    cache.update(key, value, 0)
    tokens = [prompt[-1]]
    for _ in range(num_new):
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]
