"""Tokenizers written into GGUF files as llama.cpp's converter writes them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from tests.gguf.files import write_gguf
from tests.gguf.models import CASES, metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def from_tokenizer_json(directory: Path, pre: str) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer in Hugging Face form."""
    definition = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {entry["content"]: entry for entry in definition["added_tokens"]}
    ids = definition["model"]["vocab"] | {name: entry["id"] for name, entry in special.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    kinds = {name: CONTROL if entry["special"] else USER_DEFINED for name, entry in special.items()}
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in definition["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[config["eos_token"]],
        "tokenizer.ggml.add_bos_token": True,
    }
    if "chat_template" in config:
        found["tokenizer.chat_template"] = config["chat_template"]
    return found


def train_sentencepiece(sentences: list[str], vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """In the manner of Llama 2: BPE, bytes for what is unknown, digits apart, white space kept."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        user_defined_symbols=["<extra>"],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def from_sentencepiece(processor: sentencepiece.SentencePieceProcessor, template: str) -> dict[str, Any]:
    ids = range(processor.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(number) for number in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(number)) for number in ids],
        "tokenizer.ggml.token_type": [_kind(processor, number) for number in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.chat_template": template,
    }


def _kind(processor: sentencepiece.SentencePieceProcessor, number: int) -> int:
    if processor.is_unknown(number):
        return UNKNOWN
    if processor.is_control(number):
        return CONTROL
    if processor.is_byte(number):
        return BYTE
    return USER_DEFINED if processor.id_to_piece(number) == "<extra>" else NORMAL


def write_tokenizer(path: Path, tokenizer: dict[str, Any], **changes: Any) -> Path:
    """A file with a tokenizer and an embedding of as many rows; ``changes`` below ``tokenizer.ggml``, None to leave
    out."""
    changed = tokenizer | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    values = {**metadata("llama", CASES["q8"].config), **changed}
    rows = np.zeros((len(tokenizer["tokenizer.ggml.tokens"]), 64), np.float32)
    known = {key: value for key, value in values.items() if value is not None}
    write_gguf(path, "llama", known, {"token_embd.weight": ("Q8_0", rows)})
    return path
