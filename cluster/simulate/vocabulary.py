"""The pretended model's tokens, each of one character, and the grammars and tools that its clients ask for."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.frontend.token_bytes import TokenBytes
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.llguidance_matcher import Compiler
from engine.request import Grammar, GrammarKind

VOCAB_SIZE = 97
NUM_PLAIN = 95
"""Space to ~. The others are what a grammar's text may end with; where nothing ends there, they are text as well."""
_TEXT = {token: chr(0x20 + token % NUM_PLAIN) for token in range(VOCAB_SIZE)}
_SPACE = "Ġ"
_NAMES = {token: text.replace(" ", _SPACE) for token, text in _TEXT.items()}
TABLE = TokenBytes(_NAMES, frozenset(), {"type": "ByteLevel"})


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(map(_TEXT.__getitem__, token_ids))


@functools.cache
def compiler() -> Compiler:
    """One for all ranks: it keeps compiled grammars, and knows nothing of requests."""
    plain = {_NAMES[token]: token for token in range(NUM_PLAIN)}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # One of them has to be known by its name as the end, or the library takes another token for it.
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("</s>", "<end>")])
    return Compiler(tokenizer.to_str())


class _AtOnce(ThreadPoolExecutor):
    """Nothing runs in a thread: its timing could not be repeated."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


class Grammars(GrammarMasks):
    """The sampling rank's, for these tokens."""

    def __init__(self) -> None:
        super().__init__(Path(), VOCAB_SIZE)

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return _AtOnce(1)

    @functools.cached_property
    def _compiler(self) -> Compiler:
        return compiler()


def allowed_behind(grammar: Grammar, generated: Sequence[int], ends: Sequence[int]) -> npt.NDArray[np.bool_]:
    """What may follow, found from the beginning each time: [VOCAB_SIZE]."""
    matcher = compiler().matcher(grammar)
    for token_id in generated:
        matcher.accept(token_id)
    allowed = matcher.allowed()
    allowed[list(ends)] = matcher.may_end
    return allowed


@dataclass(frozen=True)
class Structure:
    """A grammar that clients ask for. ``is_followed``: whether a whole text does, by another library. ``tool``: the
    name of the one that its text calls."""

    grammar: Grammar
    is_followed: Callable[[str], bool]
    tool: str = ""


def _pattern(text: str, tool: str = "") -> Structure:
    return Structure(Grammar(GrammarKind.REGEX, text), lambda found: re.fullmatch(text, found) is not None, tool)


def _is_list_of_truths(text: str) -> bool:
    found = json.loads(text)
    return isinstance(found, list) and len(found) <= 4 and all(isinstance(each, bool) for each in found)


_LIST = {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}

STRUCTURES = (
    _pattern("[a-f]{2,9} ?:[0-9]{1,6}"),
    _pattern("(ab|ba|c)+"),
    Structure(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_LIST)), _is_list_of_truths),
    _pattern(r'\{"name": "f", "parameters": \{"a": [1-9][0-9]{0,6}\}\}', tool="f"),
)
