"""The byte-level BPE tokenizer of remuda-tiny: 2032 learned tokens and 16 special tokens at the end (as Llama 4)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from recipe_chat import conversation
from recipe_verse import passages
from recipe_words import random_name
from tokenizers import AddedToken as Added
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
MAX_LENGTH = 2048
BOS, END_OF_TEXT, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|pad|>"
HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"
SPECIAL_TOKENS = (
    BOS, END_OF_TEXT, HEADER_START, HEADER_END, EOT, "<|eom|>", "<|python_start|>", "<|python_end|>", PAD,
    *(f"<|reserved_special_token_{i}|>" for i in range(7)),
)  # fmt: skip
# One digit is one token, so that numbers are copied digit by digit; otherwise Llama 3's and 4's splitting.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable and message['content'] is not mapping %}
        {%- for part in message['content'] %}
            {%- if part['type'] != 'text' %}
                {{- raise_exception('remuda-tiny reads text only, not ' + part['type']) }}
            {%- endif %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}"""


def _sample_texts(seed: int, verse_chapters: list[list[str]]) -> list[str]:
    rng = random.Random(seed)
    texts = [m["content"] for _ in range(12_000) for m in conversation(rng)]
    texts += [" ".join(random_name(rng) for _ in range(20)) for _ in range(600)]
    for verses in verse_chapters[::4]:
        texts += passages(verses, 600)
    return texts


def train_tokenizer(seed: int, verse_chapters: list[list[str]]) -> Tokenizer:
    """Learn the merges from a sample of the recipe; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(seed, verse_chapters), trainer)
    tokenizer.add_special_tokens([Added(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `directory`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
