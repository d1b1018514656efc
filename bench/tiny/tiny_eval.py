"""Held-out text, perplexity on it, and the share of tokens each expert gets."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from recipe_chat import Message, conversation
from recipe_verse import passages
from tiny_data import Document, Encoder, collate
from tiny_model import sparse_experts, special_id
from tiny_tokenizer import PAD
from torch import Tensor
from transformers import Llama4ForCausalLM

HELD_OUT_FILE = Path(__file__).with_name("heldout.jsonl")
NUM_CHATS = 100


def write_held_out(verse_chapters: list[list[str]], path: Path = HELD_OUT_FILE) -> None:
    """Conversations from a seed that training never uses, and the chapters that it leaves out."""
    rng = random.Random("held-out")
    rows: list[dict[str, object]] = [{"kind": "chat", "messages": conversation(rng)} for _ in range(NUM_CHATS)]
    rows += [{"kind": "verse", "text": t} for verses in verse_chapters for t in passages(verses, 800)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_held_out(encoder: Encoder, path: Path = HELD_OUT_FILE) -> dict[str, list[Document]]:
    """kind -> documents; in chats only the assistant's tokens count, with weight 1."""
    found: dict[str, list[Document]] = {"chat": [], "verse": []}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "verse":
            found["verse"].append(encoder.text(row["text"]))
            continue
        messages: list[Message] = row["messages"]
        doc = encoder.chat(messages)
        doc.weights = [1.0 if w == 1.0 else 0.0 for w in doc.weights]
        found["chat"].append(doc)
    return found


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy in nats of predicting ids[:, 1:]; shape (rows, length - 1)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@dataclass
class Score:
    """`loss` in nats per counted token; `shares[layer][expert]` sums to 1 per MoE layer."""

    loss: float
    num_tokens: int
    shares: list[list[float]]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def score(model: Llama4ForCausalLM, docs: list[Document]) -> Score:
    """Mean loss over the documents' weighted tokens, each document alone from position 0."""
    total = weight = 0.0
    counts: list[Tensor] = []
    ordered = sorted(docs, key=lambda d: len(d.ids))
    for at in range(0, len(ordered), 8):
        batch = collate(ordered[at : at + 8], special_id(PAD))
        with sparse_experts(model) as record:
            logits = model(batch.ids, use_cache=False).logits
        total += float((token_losses(logits, batch.ids) * batch.weights[:, 1:]).sum())
        weight += float(batch.weights[:, 1:].sum())
        keep = (batch.ids != special_id(PAD)).flatten()
        num_experts = model.config.num_local_experts
        found = torch.stack([torch.bincount(c[keep], minlength=num_experts) for c in record.choices])
        counts = [found] if not counts else [counts[0] + found]
    shares = counts[0] / counts[0].sum(dim=1, keepdim=True)
    return Score(total / weight, int(weight), [[round(v, 3) for v in row] for row in shares.tolist()])


@torch.no_grad()
def answer(model: Llama4ForCausalLM, encoder: Encoder, messages: list[Message], max_tokens: int = 120) -> str:
    """The greedy answer, by transformers' own generate and its own MoE forward."""
    doc = encoder.chat(messages)
    header = encoder.chat([{"role": "assistant", "content": ""}])
    prompt = torch.tensor([doc.ids + header.ids[1:-1]])
    out = model.generate(  # type: ignore[misc]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, temperature=None,
        top_p=None, eos_token_id=model.config.eos_token_id, pad_token_id=special_id(PAD),
    )  # fmt: skip
    return encoder.decode(out[0, prompt.shape[1] :].tolist())
