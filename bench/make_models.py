"""Build the benchmark checkpoints: random weights from a seed, bfloat16 safetensors, in Hugging Face form.

    python bench/make_models.py [dense-0.5b] [dense-1b] [moe-small] [--force]

They lie in ``$REMUDA_BENCH_CACHE/models`` (``~/.cache/remuda-bench/models``). Rows of the output head that belong to
non-ASCII or special tokens are zero, so greedy output is always printable and never ends by itself: no server holds a
chunk back for an incomplete character. ``good_ids.json`` lists the other tokens, for prompts.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.bench_cache import model_dir
from bench.model_tokenizers import (
    LLAMA3_VOCAB_SIZE,
    LLAMA3_WHEEL,
    llama3_tokenizer,
    printable_ids,
    save_tokenizer,
    trained_tokenizer,
)

SMALL_VOCAB_SIZE = 32_768


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint comes about; ``model`` gets the saved tokenizer for its vocabulary and special ids."""

    seed: int
    tokenizer: Callable[[], Tokenizer]
    model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]


def small_tokenizer() -> Tokenizer:
    return trained_tokenizer(SMALL_VOCAB_SIZE)


def large_tokenizer() -> Tokenizer:
    """Llama 3's, or one of the same size: memory and speed depend on the size alone."""
    tokenizer = llama3_tokenizer()
    if tokenizer is not None:
        return tokenizer
    print(
        f"{LLAMA3_WHEEL} could not be downloaded: dense-1b gets a tokenizer of the same size, trained here", flush=True
    )
    return trained_tokenizer(LLAMA3_VOCAB_SIZE)


def dense_half_billion(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """0.432 B parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=4096,
            vocab_size=len(tokenizer),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def dense_one_billion(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The shapes of Llama 3.2 1B: 1.236 B parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            vocab_size=len(tokenizer),
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def moe_small(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Llama 4 text, 8 experts and a shared one in every layer: 0.698 B parameters, about 0.2 B of them active."""
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            hidden_size=1024,
            num_hidden_layers=14,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=1536,
            intermediate_size_mlp=4096,
            vocab_size=len(tokenizer),
            num_local_experts=8,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_qk_norm=True,
            attention_chunk_size=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name or "router" in name:  # the class leaves these as allocated
                parameter.normal_(0, 0.02)
    return model


RECIPES = {
    "dense-0.5b": Recipe(1, small_tokenizer, dense_half_billion),
    "dense-1b": Recipe(2, large_tokenizer, dense_one_billion),
    "moe-small": Recipe(3, small_tokenizer, moe_small),
}


def build(name: str, folder: Path) -> None:
    """Build one checkpoint in ``folder``, which appears only when it is complete."""
    recipe = RECIPES[name]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = save_tokenizer(recipe.tokenizer(), partial)
    ids = printable_ids(tokenizer)
    torch.manual_seed(recipe.seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = recipe.model(tokenizer)
    finally:
        torch.set_default_dtype(previous)
    silence(model, ids)
    model.save_pretrained(partial, max_shard_size="20GB")
    (partial / "good_ids.json").write_text(json.dumps(ids))
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    (partial / "generation_config.json").write_text(json.dumps(generation))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {num_parameters / 1e9:.3f} B parameters, {len(ids)} printable tokens", flush=True)


def silence(model: PreTrainedModel, spoken_ids: list[int]) -> None:
    """Zero the output rows of every token that is not spoken: its logit is 0, and some spoken one is above that."""
    weight = model.get_output_embeddings().weight
    silent = torch.ones(weight.shape[0], dtype=torch.bool)
    silent[torch.tensor(spoken_ids)] = False
    with torch.no_grad():
        weight[silent] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the benchmark checkpoints.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--force", action="store_true", help="build again what is there")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RECIPES]
    if unknown:
        parser.error(f"unknown checkpoint {unknown[0]!r}: choose from {', '.join(RECIPES)}")
    for name in arguments.names or RECIPES:
        folder = model_dir(name)
        if folder.exists() and not arguments.force:
            print(f"{folder}: already there", flush=True)
        else:
            build(name, folder)


if __name__ == "__main__":
    main()
