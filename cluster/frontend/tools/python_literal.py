"""Reading the values of pythonic calls: Python's literals, a character at a time, never evaluated.

Numbers, strings, True, False, None (and JSON's true, false, null), lists, tuples (as lists) and dicts with string keys.
Not names, operators, string prefixes, triple quotes or strings side by side: those are malformed.
"""

import json
import math
import re
from typing import Any

from cluster.frontend.tools.cursor import MAX_DEPTH, Cursor, Malformed, Steps, skip_whitespace

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_MAX_NUMBER_CHARS = 400
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""}
_ESCAPES.update({char: char for char in "\\'\""})
_NUM_HEX = {"x": 2, "u": 4, "U": 8}
_OCTAL = "01234567"


def read_literal(cursor: Cursor, depth: int = 0) -> Steps[Any]:
    """One value, in the types that json.dumps writes. Raises Malformed."""
    char = cursor.char
    value: Any
    if depth > MAX_DEPTH or not char:
        raise Malformed
    if char in "'\"":
        value = yield from _string(cursor)
    elif char == "[":
        value = (yield from _items(cursor, "]", depth))[0]
    elif char == "(":
        items, num_commas = yield from _items(cursor, ")", depth)
        # One value in parentheses is that value; a comma makes it a tuple.
        value = items[0] if len(items) == 1 and not num_commas else items
    elif char == "{":
        value = yield from _dict(cursor, depth)
    elif char.isalpha():
        word = yield from _run(cursor)
        if word not in _WORDS:
            raise Malformed
        value = _WORDS[word]
    else:
        value = _number((yield from _run(cursor)))
    return value


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _items(cursor: Cursor, closing: str, depth: int) -> Steps[tuple[list[Any], int]]:
    yield
    yield from skip_whitespace(cursor)
    items: list[Any] = []
    num_commas = 0
    while cursor.char != closing:
        items.append((yield from read_literal(cursor, depth + 1)))
        yield from skip_whitespace(cursor)
        if cursor.char == ",":
            num_commas += 1
            yield
            yield from skip_whitespace(cursor)
        elif cursor.char != closing:
            raise Malformed
    yield
    return items, num_commas


def _dict(cursor: Cursor, depth: int) -> Steps[dict[str, Any]]:
    yield
    yield from skip_whitespace(cursor)
    entries: dict[str, Any] = {}
    while cursor.char != "}":
        if not cursor.char or cursor.char not in "'\"":
            raise Malformed
        key = yield from _string(cursor)
        yield from skip_whitespace(cursor)
        if cursor.char != ":":
            raise Malformed
        yield
        yield from skip_whitespace(cursor)
        entries[key] = yield from read_literal(cursor, depth + 1)
        yield from skip_whitespace(cursor)
        if cursor.char == ",":
            yield
            yield from skip_whitespace(cursor)
        elif cursor.char != "}":
            raise Malformed
    yield
    return entries


def _run(cursor: Cursor) -> Steps[str]:
    """The characters of a word or a number."""
    text = ""
    while cursor.char and (cursor.char.isalnum() or cursor.char in "+-._"):
        text += cursor.char
        if len(text) > _MAX_NUMBER_CHARS:
            raise Malformed
        yield
    return text


def _number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(value := float(text)):
        return value
    raise Malformed


def _string(cursor: Cursor) -> Steps[str]:
    quote = cursor.char
    yield
    text = ""
    while cursor.char != quote:
        if not cursor.char:
            raise Malformed
        if cursor.char == "\\":
            text += yield from _escape(cursor)
        else:
            text += cursor.char
            yield
    yield
    try:
        # Two \u escapes may be one character (UTF-16); half of one is none.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise Malformed from error


def _escape(cursor: Cursor) -> Steps[str]:
    yield
    char = cursor.char
    if char in _NUM_HEX:
        yield
        return chr((yield from _hex(cursor, _NUM_HEX[char])))
    if char and char in _OCTAL:
        digits = ""
        while len(digits) < 3 and cursor.char and cursor.char in _OCTAL:
            digits += cursor.char
            yield
        return chr(int(digits, 8))
    if char in ("", "N"):
        raise Malformed
    yield
    # As Python does it: a backslash before any other character stands for itself.
    return _ESCAPES.get(char, "\\" + char)


def _hex(cursor: Cursor, num_digits: int) -> Steps[int]:
    code = 0
    for _ in range(num_digits):
        if not cursor.char or cursor.char not in "0123456789abcdefABCDEF":
            raise Malformed
        code = code * 16 + int(cursor.char, 16)
        yield
    if code > 0x10FFFF:
        raise Malformed
    return code
