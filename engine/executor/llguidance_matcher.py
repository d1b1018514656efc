"""Grammars by llguidance."""

import functools

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from engine.executor.grammar_matcher import GrammarMatcher
from engine.grammar import LIMITS, error_message, source_of
from engine.request import Grammar

_MAX_COMPILED = 32
"""Grammars kept for the next request with the same one."""


class _Matcher:
    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._num_tokens = tokenizer.vocab_size
        # Which tokens end a text is the request's business, not the tokenizer's.
        self._ends = list(tokenizer.eos_tokens)

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise ValueError(error_message(self._matcher) or "it does not follow the grammar")

    def allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise ValueError(error_message(self._matcher))
        allowed = bits[: self._num_tokens].astype(np.bool_)
        allowed[self._ends] = False
        return allowed

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()


class Compiler:
    """Args:
    tokenizer_json: contents of the checkpoint's file.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = LLTokenizer(tokenizer_json)
        self._compiled = functools.lru_cache(_MAX_COMPILED)(self._compile)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        return _Matcher(self._compiled(grammar).deep_copy(), self._tokenizer)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, source_of(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise ValueError(error_message(matcher))
        return matcher
