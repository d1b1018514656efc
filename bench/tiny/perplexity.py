"""Perplexity of a remuda-tiny directory on the held-out text: `python bench/tiny/perplexity.py [DIRECTORY]`.

`chat` counts the assistant's tokens, `verse` all tokens. Without an option transformers computes it in float32 whatever
the type on disk. With `--quantization`, or where the directory is quantized already, it is the engine that serves the
model, in the directory's own type. `--table` compares bf16, int8, int4, fp8 and NF4 (made by bitsandbytes) so, and int8
once more where the head is a matrix of its own, and is quantized too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from served_score import served_perplexity
from tiny_data import Document, Encoder
from tiny_eval import read_held_out, score
from tokenizers import Tokenizer
from transformers import Llama4ForCausalLM

from engine.model_config import ModelConfig

ASSET = Path(__file__).resolve().parents[2] / "engine" / "assets" / "remuda-tiny"
FORMATS = ("int8", "int4", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=ASSET)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", choices=FORMATS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = Encoder(Tokenizer.from_file(str(options.directory / "tokenizer.json")))
    held_out = read_held_out(encoder)
    if options.table:
        print_table(options.directory, held_out)
    elif options.quantization or ModelConfig.from_directory(options.directory).quantization:
        print(json.dumps(served_perplexity(options.directory, options.quantization, held_out), indent=2))
    else:
        print(json.dumps(float32_report(options.directory, held_out), indent=2))


def float32_report(directory: Path, held_out: dict[str, list[Document]]) -> dict[str, object]:
    """By transformers, with the share of the tokens that each expert gets."""
    model = Llama4ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train(False)
    report: dict[str, object] = {}
    for kind, documents in held_out.items():
        found = score(model, documents)
        report[kind] = {
            "perplexity": round(found.perplexity, 4),
            "num_tokens": found.num_tokens,
            "expert_shares": found.shares,
        }
    return report


def print_table(directory: Path, held_out: dict[str, list[Document]]) -> None:
    """Markdown: each format's perplexity, and how much it is above that of bf16."""
    print("| weights | chat | verse |\n|---|---|---|")
    before = print_row("bf16", served_perplexity(directory, None, held_out), None)
    for name in FORMATS:
        print_row(name, served_perplexity(directory, name, held_out), before)
    with tempfile.TemporaryDirectory() as scratch:
        write_untied(directory, Path(scratch))
        print_row("int8, the head too", served_perplexity(Path(scratch), "int8", held_out), before)
    with tempfile.TemporaryDirectory() as scratch:
        from nf4 import write_nf4

        write_nf4(directory, Path(scratch))
        print_row("NF4", served_perplexity(Path(scratch), None, held_out), before)


def write_untied(directory: Path, target: Path) -> None:
    """The same model with its embedding once more as the output head."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors")


def print_row(name: str, found: dict[str, float], before: dict[str, float] | None) -> dict[str, float]:
    changes = {kind: "" if before is None else f" ({found[kind] / before[kind] - 1:+.2%})" for kind in found}
    print(f"| {name} | {found['chat']:.4f}{changes['chat']} | {found['verse']:.2f}{changes['verse']} |", flush=True)
    return found


if __name__ == "__main__":
    main()
