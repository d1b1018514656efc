"""Documents as token ids with a loss weight per token, gathered into padded batches of similar length.

Each row of a batch is one document that starts at position 0, as at inference: chunk borders fall where they will fall.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from recipe_chat import Message, conversation
from recipe_stories import story
from recipe_verse import passages
from recipe_words import ANIMALS, random_name
from tiny_tokenizer import BOS, END_OF_TEXT, EOT, HEADER_END, HEADER_START, PAD, SPECIAL_TOKENS, VOCAB_SIZE
from tokenizers import Tokenizer
from torch import Tensor

PROMPT_WEIGHT = 0.1  # what users write is mostly random names: little to learn there
POOL_DOCUMENTS = 1024
NUM_PLAIN_IDS = VOCAB_SIZE - len(SPECIAL_TOKENS)


@dataclass
class Document:
    ids: list[int]
    weights: list[float]  # of predicting the token at the same place

    def add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


@dataclass
class Batch:
    ids: Tensor  # (rows, length) int64, right-padded
    weights: Tensor  # (rows, length) float32; 0 on padding
    num_tokens: int


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special: dict[str, int] = {}
        for token in SPECIAL_TOKENS:
            number = tokenizer.token_to_id(token)
            assert number is not None, f"the tokenizer lacks {token}"
            self._special[token] = number

    def plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def special(self, token: str) -> int:
        return self._special[token]

    def chat(self, messages: list[Message]) -> Document:
        """The ids that the chat template gives; only what the assistant says has the full loss weight."""
        doc = Document([self.special(BOS)], [0.0])
        for message in messages:
            header = [self.special(HEADER_START), *self.plain(message["role"]), self.special(HEADER_END)]
            doc.add(header + self.plain("\n\n"), PROMPT_WEIGHT)
            weight = 1.0 if message["role"] == "assistant" else PROMPT_WEIGHT
            doc.add(self.plain(message["content"]) + [self.special(EOT)], weight)
        return doc

    def text(self, text: str, weight: float = 1.0) -> Document:
        doc = Document([self.special(BOS)], [0.0])
        doc.add(self.plain(text) + [self.special(END_OF_TEXT)], weight)
        return doc

    def drill(self, rng: random.Random) -> Document:
        """Random tokens, then the same again: teaches attention to find and copy (arXiv 2209.11895)."""
        ids = [rng.randrange(NUM_PLAIN_IDS) for _ in range(rng.randint(3, 60))]
        doc = Document([self.special(BOS)], [0.0])
        doc.add(ids, 0.0)
        doc.add(ids[:1], 0.0)
        doc.add(ids[1:], 1.0)
        return doc


class Mixture:
    """An endless, seeded stream of documents: chats, verses, plain stories and copying drills."""

    def __init__(self, encoder: Encoder, verse_chapters: list[list[str]], max_length: int) -> None:
        self._encoder = encoder
        self._chapters = verse_chapters
        self._max_length = max_length

    def document(self, rng: random.Random, drill_share: float) -> Document:
        draw = rng.random()
        if draw < drill_share:
            doc = self._encoder.drill(rng)
        elif draw < drill_share + 0.06:
            pieces = passages(rng.choice(self._chapters), rng.randint(200, 1300))
            doc = self._encoder.text(rng.choice(pieces), 0.7)
        elif draw < drill_share + 0.09:
            name = random_name(rng).split()[0]
            doc = self._encoder.text(story(rng, name, rng.choice(ANIMALS), scenes=rng.randint(1, 4)), 0.7)
        else:
            doc = self._encoder.chat(conversation(rng))
        return Document(doc.ids[: self._max_length], doc.weights[: self._max_length])

    def batches(self, seed: int, pool: int, drill_share: float, batch_tokens: int) -> list[Batch]:
        """The batches of one pool; (seed, pool) fixes them."""
        rng = random.Random(f"{seed}:{pool}")
        docs = sorted((self.document(rng, drill_share) for _ in range(POOL_DOCUMENTS)), key=lambda d: len(d.ids))
        batches = list(_rows(docs, batch_tokens))
        rng.shuffle(batches)
        return [collate(rows, self._encoder.special(PAD)) for rows in batches]


def _rows(docs: list[Document], batch_tokens: int) -> Iterator[list[Document]]:
    rows: list[Document] = []
    for doc in docs:  # sorted by length, so the newest is the longest
        if rows and (len(rows) + 1) * len(doc.ids) > batch_tokens:
            yield rows
            rows = []
        rows.append(doc)
    yield rows


def collate(rows: list[Document], pad_id: int) -> Batch:
    length = max(len(doc.ids) for doc in rows)
    ids = torch.tensor([doc.ids + [pad_id] * (length - len(doc.ids)) for doc in rows])
    weights = torch.tensor([doc.weights + [0.0] * (length - len(doc.ids)) for doc in rows])
    return Batch(ids, weights, sum(len(doc.ids) for doc in rows))
