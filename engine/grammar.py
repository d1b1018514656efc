"""What a structured answer must follow, in llguidance's form, and the check whether it can be compiled.

Both ends use this: the front end refuses what does not compile, the sampling rank compiles it again for its own
tokenizer (engine.executor.grammar_masks). Grammars are written in llguidance's dialects, whatever follows them, so
llguidance compiles all of them; another backend must take them too. Knows no torch.
"""

import functools
import importlib
import json
import time
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.config import GrammarBackend
from engine.errors import InvalidOption, InvalidRequest
from engine.request import MAX_GRAMMAR_CHARS, Grammar, GrammarKind

MAX_COMPILE_S = 1.0
"""CPU time. A grammar that takes longer is refused: it would hold up every request of the gang for as long."""
_LOCATE_S = 1.0
"""How long to look for the place of an error in a schema."""
_MAX_MESSAGE_CHARS = 500
_MAX_POINTER_CHARS = 200

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""A state is 1 to 2 kB. Bounds in steps of work (initial_lexer_fuel and so on) are the library's own."""

_JSON_OPTIONS: Any = {"whitespace_pattern": r"\x20|\n[\x20\t]{0,32}"}
"""Between two of JSON's tokens: a space, or a new line and its indentation. Without a bound a model can write white
space to its last token."""


def source_of(grammar: Grammar) -> str:
    """The grammar as LLMatcher takes it. Raises ValueError where it does not have the form of its kind."""
    text = grammar.text
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(text)
    if grammar.kind is GrammarKind.GBNF:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error
    return LLMatcher.grammar_from_lark(text)


@functools.cache
def further_check(backend: GrammarBackend) -> Callable[[Grammar], str] | None:
    """What is wrong with a grammar for this backend alone; None where llguidance's word is enough. Takes seconds the
    first time. Raises InvalidOption where the library is not installed."""
    if backend is GrammarBackend.LLGUIDANCE:
        return None
    try:
        module = importlib.import_module(f"engine.{backend}_forms")
    except ModuleNotFoundError as error:
        raise InvalidOption(
            f"--guided-decoding-backend {backend} is not installed ({error}); pip install 'remuda[{backend}]'"
        ) from error
    check: Callable[[Grammar], str] = module.error_of
    return check


@functools.lru_cache(maxsize=64)
def check_grammar(grammar: Grammar, param: str, backend: GrammarBackend = GrammarBackend.LLGUIDANCE) -> None:
    """May take MAX_COMPILE_S and more: not for an event loop.

    Args:
        grammar: of a client.
        param: the field that it came in.
        backend: what will follow it.

    Raises:
        InvalidRequest: it is too large, cannot be compiled (the message says where), or no text can follow it.
        InvalidOption: the backend is not installed.
    """
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{param} has {len(grammar.text)} characters; at most {MAX_GRAMMAR_CHARS} are compiled", param
        )
    further = further_check(backend)
    compile_s = 0.0
    for error_of in (_error_of,) if further is None else (_error_of, further):
        began_s = time.thread_time()
        error = error_of(grammar)
        compile_s += time.thread_time() - began_s
        if error:
            place = _place_of(grammar, error, error_of) if grammar.kind is GrammarKind.JSON_SCHEMA else ""
            raise InvalidRequest(f"{param} cannot be compiled{place}: {error[:_MAX_MESSAGE_CHARS]}", param)
    if compile_s > MAX_COMPILE_S:
        raise InvalidRequest(
            f"{param} takes {compile_s:.1f} s to compile, longer than {MAX_COMPILE_S:g} s; make it simpler", param
        )


class _Bytes:
    """A vocabulary in which every byte is a token: what cannot be compiled for it cannot be for any."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (eos_token_id,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _error_of(grammar: Grammar) -> str:
    """Empty where it compiles and a first byte is possible."""
    try:
        source = source_of(grammar)
    except ValueError as error:
        return str(error)
    matcher = LLMatcher(_byte_tokenizer(), source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return error_message(matcher)


def error_message(matcher: LLMatcher) -> str:
    """In words; empty where there is no error."""
    message = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "no text can follow it" if message == "NoExtensionBias" else message


def _place_of(grammar: Grammar, error: str, error_of: Callable[[Grammar], str]) -> str:
    """`` at …``: the JSON pointer of the smallest part of the schema that alone gives the same error."""
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):
        return ""
    pointer, shared = "", {}
    if isinstance(schema, dict):
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    deadline_s = time.monotonic() + _LOCATE_S
    while len(pointer) < _MAX_POINTER_CHARS:
        for path, part in _parts(schema):
            if time.monotonic() > deadline_s:
                return f" at {pointer or 'its root'}"
            inside = {**shared, **part} if "$ref" in json.dumps(part) else part
            if error_of(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(inside))) == error:
                pointer, schema = pointer + path, part
                break
        else:
            break
    return f" at {pointer or 'its root'}"


def _parts(schema: Any) -> list[tuple[str, dict[str, Any]]]:
    """The schemas directly inside a schema, each with its pointer from there."""
    found: list[tuple[str, Any]] = []
    if not isinstance(schema, dict):
        return []
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(entries := schema.get(key), dict):
            found += [(f"/{key}/{_escaped(name)}", entry) for name, entry in entries.items()]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(entries := schema.get(key), list):
            found += [(f"/{key}/{number}", entry) for number, entry in enumerate(entries)]
    found += [(f"/{key}", schema[key]) for key in ("items", "additionalProperties", "additionalItems") if key in schema]
    return [(path, part) for path, part in found if isinstance(part, dict)]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
