"""Grammars as xgrammar compiles them, where that extra is installed (Dong et al., XGrammar: Flexible and Efficient
Structured Generation Engine for Large Language Models, 2024).

Both ends use this, as they do engine.grammar. xgrammar imports torch, so this is imported by name and only where
``--guided-decoding-backend xgrammar`` asks for it.
"""

import functools
import re

import xgrammar

from engine.request import Grammar, GrammarKind

_MAX_WHITE_SPACE = 33
"""Between two of JSON's tokens, as engine.grammar has it."""
_SOURCE_PLACE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""Time and line of C++ code, which the library puts before its messages."""


def compile_grammar(compiler: xgrammar.GrammarCompiler, grammar: Grammar) -> xgrammar.CompiledGrammar:
    """Raises ValueError where it cannot be compiled."""
    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            return compiler.compile_json_schema(grammar.text, strict_mode=False, max_whitespace_cnt=_MAX_WHITE_SPACE)
        if grammar.kind is GrammarKind.REGEX:
            return compiler.compile_regex(grammar.text)
        if grammar.kind is GrammarKind.LARK:
            return compiler.compile_lark(grammar.text)
        return compiler.compile_grammar(grammar.text)
    except RuntimeError as error:
        raise ValueError(f"xgrammar cannot compile it: {_SOURCE_PLACE.sub('', str(error).strip())}") from error


def error_of(grammar: Grammar) -> str:
    """Empty where it compiles, for a vocabulary in which every byte is a token: what cannot be compiled for it cannot
    be for any."""
    try:
        compile_grammar(_byte_compiler(), grammar)
    except ValueError as error:
        return str(error)
    return ""


@functools.cache
def _byte_compiler() -> xgrammar.GrammarCompiler:
    """Keeps nothing: whoever asks keeps the answer."""
    tokens = [*(bytes([byte]) for byte in range(256)), b""]
    end = len(tokens) - 1
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=[end])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
