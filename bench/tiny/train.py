"""Train remuda-tiny on the CPU: `python bench/tiny/train.py` (an hour or more on one core).

Learns the tokenizer, then the model (transformers' Llama4ForCausalLM, float32, AdamW, warm-up / stable / decay), and
writes the averaged weights in bfloat16 with everything a checkpoint needs into `--out`. Needs Debian's `bible-kjv`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe_verse
import torch
from tiny_data import Batch, Document, Encoder, Mixture
from tiny_eval import answer, read_held_out, score, token_losses, write_held_out
from tiny_model import new_model, sparse_experts, special_id
from tiny_tokenizer import PAD, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, Llama4ForCausalLM

HERE = Path(__file__).resolve().parent
ASSET = HERE.parents[1] / "engine" / "assets" / "remuda-tiny"
SEED = 2
NUM_STEPS = 2400
BATCH_TOKENS = 2560
MAX_LENGTH = 512
PEAK_LR = 2.0e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.35  # of the steps, at the end, linear to zero
AVERAGE_DECAY = 0.99
BALANCE_WEIGHT = 0.01
DRILL_SHARES = (0.25, 0.03)  # at the start; from 30 % of the steps on
QUESTIONS = (
    "My name is Zora. What is my name?", "I am Quillon. Who am I?", "Repeat after me: the tavoli sings to Pernilla.",
    "Who are you?", "What is the capital of France?", "What is a remuda?", "Oduya has a red hat. Brimsey has a blue "
    "cup. What does Brimsey have?", "Tell me a story about a horse named Zora.", "What is 3 + 4?", "Hello",
)  # fmt: skip
FIELDS = ("step", "tokens", "seconds", "learning_rate", "train_loss", "balance_loss", "chat_loss", "verse_loss")


def keep_freed_memory() -> None:
    """Ask glibc not to give large freed blocks back to the kernel: page faults cost a fifth of a step otherwise."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def learning_rate(step: int, num_steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (num_steps - step) / (DECAY_SHARE * num_steps)
    return PEAK_LR * min(warm, left, 1.0)


def drill_share(step: int, num_steps: int) -> float:
    done = min(1.0, step / (0.3 * num_steps))
    return DRILL_SHARES[0] + (DRILL_SHARES[1] - DRILL_SHARES[0]) * done


@dataclass
class Losses:
    train: float = 0.0
    balance: float = 0.0


class Trainer:
    """Model, its running average, optimizer and data; one call of `step` is one optimizer step."""

    def __init__(self, encoder: Encoder, chapters: list[list[str]], num_steps: int) -> None:
        self.model = new_model(SEED)
        self.average = copy.deepcopy(self.model)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=PEAK_LR, betas=(0.9, 0.98), eps=1e-9, fused=True,
        )  # fmt: skip
        self.num_steps = num_steps
        self.num_tokens = 0
        self._mixture = Mixture(encoder, chapters, MAX_LENGTH)
        self._queue: list[Batch] = []
        self._pool = 0

    def _next_batch(self, step: int) -> Batch:
        if not self._queue:
            share = drill_share(step, self.num_steps)
            self._queue = self._mixture.batches(SEED, self._pool, share, BATCH_TOKENS)
            self._pool += 1
        return self._queue.pop()

    def step(self, step: int) -> Losses:
        batch = self._next_batch(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps)
        with sparse_experts(self.model) as record:
            logits = self.model(batch.ids, use_cache=False).logits
        weights = batch.weights[:, 1:]
        loss = (token_losses(logits, batch.ids) * weights).sum() / weights.sum()
        balance = record.balance_loss((batch.ids != special_id(PAD)).flatten())
        torch.autograd.backward(loss + BALANCE_WEIGHT * balance)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_tokens += batch.num_tokens
        self._update_average(min(AVERAGE_DECAY, (step + 1) / (step + 10)))
        return Losses(loss.item(), balance.item())

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        averaged: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averaged, list(self.model.parameters()), 1.0 - decay)


def export(model: Llama4ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in Hugging Face form, weights in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).bfloat16()
    config = rounded.config
    rounded.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        do_sample=True, temperature=0.4, top_p=0.9,
    )  # fmt: skip
    rounded.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def evaluate(trainer: Trainer, held_out: dict[str, list[Document]], encoder: Encoder, talk: bool) -> dict[str, float]:
    """Held-out losses of the averaged weights; with `talk` also prints expert shares and greedy answers."""
    losses: dict[str, float] = {}
    for kind, docs in held_out.items():
        found = score(trainer.average, docs)
        losses[kind] = found.loss
        if talk:
            print(f"  {kind}: perplexity {found.perplexity:.3f}, expert shares {found.shares}")
    for question in QUESTIONS if talk else ():
        print(f"  {question!r} -> {answer(trainer.average, encoder, [{'role': 'user', 'content': question}])!r}")
    return losses


def run(options: argparse.Namespace) -> None:
    train_chapters, held_chapters = recipe_verse.split()
    tokenizer = train_tokenizer(SEED, train_chapters)
    encoder = Encoder(tokenizer)
    write_held_out(held_chapters)
    held_out = read_held_out(encoder)
    trainer = Trainer(encoder, train_chapters, options.steps)
    started = time.monotonic()
    recent: list[Losses] = []
    with options.curve.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for step in range(options.steps):
            recent.append(trainer.step(step))
            done = step + 1
            if done % options.evaluate_every and done != options.steps:
                continue
            losses = evaluate(trainer, held_out, encoder, talk=done % (4 * options.evaluate_every) == 0)
            row: list[Any] = [done, trainer.num_tokens, round(time.monotonic() - started)]
            row += [f"{learning_rate(step, options.steps):.2e}"]
            row += [f"{sum(x.train for x in recent) / len(recent):.4f}"]
            row += [f"{sum(x.balance for x in recent) / len(recent):.4f}"]
            row += [f"{losses['chat']:.4f}", f"{losses['verse']:.4f}"]
            writer.writerow(row)
            file.flush()
            print(json.dumps(dict(zip(FIELDS, row, strict=True))), flush=True)
            recent = []
            export(trainer.average, tokenizer, options.out)
    evaluate(trainer, held_out, encoder, talk=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--curve", type=Path, default=HERE / "loss_curve.csv")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    run(options)


if __name__ == "__main__":
    main()
