"""Tokenizers of the benchmark checkpoints: one trained on text that every machine has, or Llama 3's own."""

import base64
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bench.bench_cache import cache_dir

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TURN = "<|eot_id|>"
PADDING = "<|finetune_right_pad_id|>"
# Llama 3's order, so that its ids come out right: 128000 begins a text, 128009 ends a turn.
NAMED_SPECIALS = [
    BEGIN_OF_TEXT,
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PADDING,
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    END_OF_TURN,
    "<|python_tag|>",
]
NUM_SPECIALS = 256
LLAMA3_VOCAB_SIZE = 128_256
LLAMA3_WHEEL = "llama-models==0.3.0"
# How Llama 3 splits text before byte pairs are merged.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def trained_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on Python's standard library, filled up to exactly ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    _split_like_llama3(tokenizer)
    num_plain = vocab_size - NUM_SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=min(num_plain, 32_512),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(tokenizer.get_vocab_size(), num_plain)])
    _finish(tokenizer, vocab_size)
    return tokenizer


def llama3_tokenizer() -> Tokenizer | None:
    """Llama 3's own tokenizer out of the ``llama-models`` wheel; None where the wheel cannot be downloaded."""
    wheel = _llama3_wheel()
    if wheel is None:
        return None
    ranks = {}
    with zipfile.ZipFile(wheel) as archive:
        for line in archive.read("llama_models/llama3/tokenizer.model").splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    characters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True, fuse_unk=False))
    _split_like_llama3(tokenizer)
    _finish(tokenizer, LLAMA3_VOCAB_SIZE)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer and its chat template in Hugging Face form."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    # The class that every version of transformers and every other reader knows.
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )
    return wrapped


def printable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that decode to printable ASCII on their own: output made of them streams token by token."""
    left_out = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = []
    for token_id in range(len(tokenizer)):
        text = str(tokenizer.decode([token_id]))
        if text and text.isascii() and "<" not in text and all(c.isprintable() or c == "\n" for c in text):
            ids.append(token_id)
    return [token_id for token_id in ids if token_id not in left_out]


def _training_texts() -> Iterator[str]:
    sources = sorted(Path(os.__file__).parent.glob("**/*.py"))[:1500]
    for path in sources:
        if "site-packages" not in path.parts and path.stat().st_size < 400_000:
            yield path.read_text(errors="replace")


def _split_like_llama3(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _finish(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the special tokens and begin every text with one."""
    num_reserved = NUM_SPECIALS - len(NAMED_SPECIALS)
    specials = NAMED_SPECIALS + [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + num_reserved)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    begin = (BEGIN_OF_TEXT, tokenizer.token_to_id(BEGIN_OF_TEXT))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN_OF_TEXT} $A", pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT} $B", special_tokens=[begin]
            ),
        ]
    )


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merges that a rank-ordered vocabulary implies: every split of a token into two tokens, by rank."""
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _llama3_wheel() -> Path | None:
    folder = cache_dir() / "downloads"
    if not list(folder.glob("llama_models-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), LLAMA3_WHEEL]
        subprocess.run(command, check=False, capture_output=True, timeout=300)
    return next(folder.glob("llama_models-*.whl"), None)
