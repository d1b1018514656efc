"""Tokenizers from GGUF metadata against those that they were written from, and against transformers' own reader."""

import json
import random
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import CheckpointError
from tests.frontend.tokenizers_for_tests import CORPUS, LLAMA2_TEMPLATE
from tests.gguf.tokenizers_for_gguf import (
    from_sentencepiece,
    from_tokenizer_json,
    train_sentencepiece,
    write_tokenizer,
)

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"
NUM_TEXTS = 400
MESSAGES = [
    {"role": "user", "content": "Hi <|eot|> </s> there, 日本"},
    {"role": "assistant", "content": " Fine.  "},
    {"role": "user", "content": "And 12345?"},
]


def texts(seed: int) -> Iterator[str]:
    """Words, spaces of all kinds, digits, characters of many scripts, unfinished clusters, and what looks special."""
    generator = random.Random(seed)
    words = " ".join(CORPUS).split()
    ranges = [(32, 126), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0x1F600, 0x1F640)]
    others = ["'ll", "'S", "\n", "\r\n", "\t ", "  ", "    ", "...", "//", "HTTPServer", "isOn"]
    others += ["<|eot|>", "<s>", "</s>", "<0x41>", "▁", "ﬁ"]
    for _ in range(NUM_TEXTS):
        pieces = []
        for _ in range(generator.randint(0, 12)):
            kind = generator.randrange(4)
            if kind == 0:
                pieces.append(generator.choice(words) + " " * generator.randint(0, 2))
            elif kind == 1:
                pieces.append(chr(generator.randint(*generator.choice(ranges))))
            elif kind == 2:
                pieces.append(str(generator.randint(0, 99999)))
            else:
                pieces.append(generator.choice(others))
        yield "".join(pieces)


def composed(texts: Iterable[str]) -> Iterator[str]:
    return (unicodedata.normalize("NFC", text) for text in texts)


def load(path: Path) -> Tokenizer:
    return Tokenizer(read_model_files(path))


def test_remuda_tiny_is_the_same_from_a_file(tmp_path: Path, seed: int) -> None:
    metadata = from_tokenizer_json(TINY, "qwen2") | {"general.sampling.temp": 0.75}
    path = write_tokenizer(tmp_path / "tiny.gguf", metadata)
    ours, original = load(path), load(TINY)
    # qwen2 composes characters, remuda-tiny's own does not.
    for text in composed(texts(seed)):
        for options in ({}, {"add_special_tokens": False}, {"parse_special_tokens": True}):
            ids = ours.encode(text, **options)
            assert ids == original.encode(text, **options)
        assert ours.decode(ids) == original.decode(ids)
    assert ours.encode_chat(MESSAGES) == original.encode_chat(MESSAGES)
    assert ours.special_ids == original.special_ids
    files = read_model_files(path)
    assert files.named_tokens["bos_token"] == "<|begin_of_text|>"
    assert files.vocab_size == 2048
    assert files.sampling_defaults == {"temperature": 0.75}


def _trained_byte_level(directory: Path) -> Path:
    """A byte-level vocabulary with a control token and one that a user defined."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Not cut into words, so that only the cuts keep long tokens out of a text.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *(text.replace("<|eot|>", "") for text in texts(0))], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|eot|>", special=True, normalized=False)])
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|eot|>", "eos_token": "<|eot|>"}))
    return directory


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_words_are_cut_as_transformers_cuts_them(tmp_path: Path, seed: int, pre: str) -> None:
    metadata = from_tokenizer_json(_trained_byte_level(tmp_path / "trained"), pre)
    ours = load(write_tokenizer(tmp_path / "m.gguf", metadata, add_bos_token=False))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in composed([*CORPUS, "a <think> b<think>", *texts(seed)]):
        assert ours.encode(text, parse_special_tokens=True) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_words_are_cut_as_the_original_cuts_them(tmp_path: Path, seed: int, pre: str) -> None:
    """Those that transformers' reader of GGUF does not tell apart, from their definitions on the hub."""
    directory = _trained_byte_level(tmp_path / "trained")
    original = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    table = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    original.pre_tokenizer = pre_tokenizers.Sequence([*digits, table])
    ours = load(write_tokenizer(tmp_path / "m.gguf", from_tokenizer_json(directory, pre), add_bos_token=False))
    for text in [*CORPUS, *texts(seed)]:
        assert ours.encode(text, parse_special_tokens=True) == original.encode(text).ids, text


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    more = [f"{word} {number}  {word.upper()}" for number, word in enumerate(" ".join(CORPUS).split())]
    return train_sentencepiece([*CORPUS, *more], 560)


def test_sentencepiece_is_the_same_as_the_library(
    tmp_path: Path, seed: int, processor: sentencepiece.SentencePieceProcessor
) -> None:
    path = write_tokenizer(tmp_path / "llama2.gguf", from_sentencepiece(processor, LLAMA2_TEMPLATE))
    ours = load(path)
    for text in [*CORPUS, *texts(seed)]:
        expected = processor.encode(text)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.encode(text) == [processor.bos_id(), *expected]
        assert ours.decode(expected) == processor.decode(expected)
    # What a user defined is found in the text; the text behind it begins anew, as in llama.cpp.
    pieces = ["One thing", "another", " third\n"]
    expected = processor.encode(pieces[0])
    for piece in pieces[1:]:
        expected += [processor.piece_to_id("<extra>"), *processor.encode(piece)]
    assert ours.encode("<extra>".join(pieces), add_special_tokens=False) == expected
    files = read_model_files(path)
    assert files.eos_ids == (processor.eos_id(),)
    assert files.named_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_chat_in_llama_2_form(tmp_path: Path, processor: sentencepiece.SentencePieceProcessor) -> None:
    ours = load(write_tokenizer(tmp_path / "llama2.gguf", from_sentencepiece(processor, LLAMA2_TEMPLATE)))
    bos, eos = processor.bos_id(), processor.eos_id()
    expected = [bos, *processor.encode("[INST] Hi <|eot|> </s> there, 日本 [/INST] Fine. "), eos]
    assert ours.encode_chat(MESSAGES) == expected + [bos, *processor.encode("[INST] And 12345? [/INST]")]


def test_a_text_without_a_space_before_it(tmp_path: Path, processor: sentencepiece.SentencePieceProcessor) -> None:
    metadata = from_sentencepiece(processor, LLAMA2_TEMPLATE)
    changes = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    ours = load(write_tokenizer(tmp_path / "m.gguf", metadata, **changes))
    prefixed = processor.encode("The quick")
    assert processor.id_to_piece(prefixed[0]).startswith("▁")
    ids = ours.encode("The quick")
    assert ids[-1] == processor.eos_id()
    assert ours.decode(ids[:-1]) == "The quick"
    assert ids[:-1] != prefixed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "kind 't5'; served are gpt2 and llama"),
        ({"pre": "deepseek-llm"}, r"'deepseek-llm' \(tokenizer\.ggml\.pre\); known are llama-bpe, .*qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"merges": None}, "no strings tokenizer.ggml.merges"),
        ({"merges": ["a nothing"]}, "the merge 'a nothing'"),
        ({"token_type": [1, 2]}, "902 tokens and 2 token types"),
        ({"bos_token_id": 9999}, "bos_token_id is 9999"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    metadata = from_tokenizer_json(_trained_byte_level(tmp_path / "trained"), "qwen2")
    path = write_tokenizer(tmp_path / "odd.gguf", metadata, **changes)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(path)
    assert "odd.gguf" in str(refusal.value)


def test_llama_3_ends_at_every_end_of_turn(tmp_path: Path) -> None:
    """The metadata names one id; the vocabulary tells the others."""
    metadata = from_tokenizer_json(_trained_byte_level(tmp_path / "trained"), "llama-bpe")
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    metadata |= {"tokenizer.ggml.tokens": tokens}
    kinds = [*metadata["tokenizer.ggml.token_type"], 3, 3, 3]
    path = write_tokenizer(tmp_path / "m.gguf", metadata, token_type=kinds, eos_token_id=len(tokens) - 1)
    assert read_model_files(path).eos_ids == (len(tokens) - 1, len(tokens) - 3, len(tokens) - 2)
