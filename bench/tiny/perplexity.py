"""Perplexity of a remuda-tiny directory on the held-out text: `python bench/tiny/perplexity.py [DIRECTORY]`.

Weights are computed in float32 whatever their type on disk. `chat` counts the assistant's tokens, `verse` all tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tiny_data import Encoder
from tiny_eval import read_held_out, score
from tokenizers import Tokenizer
from transformers import Llama4ForCausalLM

ASSET = Path(__file__).resolve().parents[2] / "engine" / "assets" / "remuda-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=ASSET)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = Encoder(Tokenizer.from_file(str(options.directory / "tokenizer.json")))
    model = Llama4ForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    model.train(False)
    report = {}
    for kind, docs in read_held_out(encoder).items():
        found = score(model, docs)
        report[kind] = {
            "perplexity": round(found.perplexity, 4),
            "num_tokens": found.num_tokens,
            "expert_shares": found.shares,
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
