"""Grammars by xgrammar, where that extra is installed. Front ends have compiled them by both libraries."""

import numpy as np
import numpy.typing as npt
import xgrammar
from tokenizers import Tokenizer

from engine.executor.grammar_matcher import GrammarMatcher
from engine.request import Grammar
from engine.xgrammar_forms import compile_grammar

_CACHE_BYTES = 256 << 20
_BITS_PER_WORD = 32


class _Matcher:
    def __init__(self, matcher: xgrammar.GrammarMatcher, num_tokens: int, ends: list[int]) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens
        self._ends = ends
        self._words = np.zeros((1, -(-num_tokens // _BITS_PER_WORD)), dtype=np.int32)

    def accept(self, token_id: int) -> None:
        if not self._matcher.accept_token(token_id):
            raise ValueError("it does not follow the grammar")

    def allowed(self) -> npt.NDArray[np.bool_]:
        self._words.fill(-1)
        self._matcher.fill_next_token_bitmask(self._words)
        bits = np.unpackbits(self._words.view(np.uint8)[0], bitorder="little")
        allowed = bits[: self._num_tokens].astype(np.bool_)
        allowed[self._ends] = False
        return allowed

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_completed())


class Compiler:
    """Args:
    tokenizer_json: contents of the checkpoint's file.
    """

    def __init__(self, tokenizer_json: str) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._num_tokens = max(vocabulary.values()) + 1
        # An empty string is a token that no text contains: control tokens, and ids that stand for nothing.
        tokens = [""] * self._num_tokens
        for token, id_ in vocabulary.items():
            tokens[id_] = "" if id_ in special else token
        kind = xgrammar.VocabType.BYTE_LEVEL if _is_byte_level(tokenizer) else xgrammar.VocabType.BYTE_FALLBACK
        self._ends = sorted(special)
        info = xgrammar.TokenizerInfo(tokens, kind, vocab_size=self._num_tokens, stop_token_ids=self._ends)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        compiled = compile_grammar(self._compiler, grammar)
        return _Matcher(xgrammar.GrammarMatcher(compiled), self._num_tokens, self._ends)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return "ByteLevel" in str(tokenizer.decoder)
