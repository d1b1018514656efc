"""Random prompts of wanted lengths, some of which begin alike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Prompt = str | list[int]

# Frequent words, which most tokenizers hold as one token each with the space before them.
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many before must through years where much your way down should because long each "
    "just state those people too little good make world still see own work life day get here between both another same"
).split()


class PromptText(Protocol):
    """Makes text or token ids of about so many tokens; the server adds about ``overhead`` to each prompt."""

    @property
    def overhead(self) -> float: ...

    def draw(self, num_tokens: float, generator: random.Random) -> Prompt: ...

    def join(self, first: Prompt, second: Prompt) -> Prompt: ...


@dataclass(frozen=True)
class Words:
    """Text. The server's own counts say how long words are: a prompt of n words has overhead + n × tokens_per_word."""

    tokens_per_word: float = 1.0
    overhead: float = 0.0

    @classmethod
    def calibrated(cls, counts: Sequence[tuple[int, int]]) -> "Words":
        """From two (words, tokens) that the server counted; template and begin tokens are the overhead."""
        (few, few_tokens), (many, many_tokens) = counts
        tokens_per_word = max((many_tokens - few_tokens) / (many - few), 0.1)
        return cls(tokens_per_word, max(few_tokens - few * tokens_per_word, 0.0))

    def draw(self, num_tokens: float, generator: random.Random) -> str:
        num_words = max(round(num_tokens / self.tokens_per_word), 1)
        return "".join(f" {word}" for word in generator.choices(_WORDS, k=num_words))

    def join(self, first: Prompt, second: Prompt) -> str:
        assert isinstance(first, str) and isinstance(second, str)
        return first + second


@dataclass(frozen=True)
class TokenIds:
    """Token ids, drawn from a list: exactly as long as wanted."""

    ids: Sequence[int]
    overhead: float = 0.0

    def draw(self, num_tokens: float, generator: random.Random) -> list[int]:
        return generator.choices(self.ids, k=max(round(num_tokens), 1))

    def join(self, first: Prompt, second: Prompt) -> list[int]:
        assert isinstance(first, list) and isinstance(second, list)
        return first + second


class PromptMaker:
    """Prompts of one run: one of ``num_prefixes`` beginnings of ``shared_len`` tokens, and then ``own_len`` more."""

    def __init__(self, text: PromptText, shared_len: int, num_prefixes: int, generator: random.Random) -> None:
        self._text = text
        self._generator = generator
        self._prefixes = [text.draw(shared_len, generator) for _ in range(num_prefixes)] if shared_len else []

    def prompt(self, own_len: int) -> Prompt:
        own = self._text.draw(own_len - self._text.overhead, self._generator)
        return self._text.join(self._generator.choice(self._prefixes), own) if self._prefixes else own
