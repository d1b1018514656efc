"""Reading JSON (RFC 8259) a character at a time, keeping its text.

One liberty: a control character inside a string, which JSON forbids and models write (a line break in a piece of code),
is read as its escape.
"""

import json
import re
from collections.abc import Callable

from cluster.frontend.tools.cursor import MAX_DEPTH, WHITESPACE, Cursor, Malformed, Steps

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_ESCAPES = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"


class JsonText:
    """The text read so far. With ``settled``, every part goes there as soon as it cannot turn out malformed any more:
    what stands inside a string value at once, anything else when it is complete.
    """

    def __init__(self, settled: Callable[[str], None] | None = None) -> None:
        self.text = ""
        self._settled = settled

    def add(self, char: str) -> None:
        self.text += char

    def settle(self) -> None:
        """The present character has been added, and all of it may be given away."""
        if self._settled is not None:
            self._settled(self.text)
            self.text = ""


def read_object(cursor: Cursor, out: JsonText, depth: int = 0) -> Steps[None]:
    """Stops *at* the closing brace, which has been added: a call that ends there ends not one character later."""
    if cursor.char != "{" or depth > MAX_DEPTH:
        raise Malformed
    out.add("{")
    yield
    yield from _space(cursor, out)
    while cursor.char != "}":
        yield from read_string(cursor, out)
        yield from _space(cursor, out)
        if cursor.char != ":":
            raise Malformed
        out.add(":")
        yield
        yield from _space(cursor, out)
        yield from _value(cursor, out, depth + 1)
        yield from _space(cursor, out)
        if cursor.char == ",":
            yield from _comma(cursor, out)
            if cursor.char != '"':
                raise Malformed
        elif cursor.char != "}":
            raise Malformed
    out.add("}")
    out.settle()


def _array(cursor: Cursor, out: JsonText, depth: int) -> Steps[None]:
    if depth > MAX_DEPTH:
        raise Malformed
    out.add("[")
    yield
    yield from _space(cursor, out)
    while cursor.char != "]":
        yield from _value(cursor, out, depth + 1)
        yield from _space(cursor, out)
        if cursor.char == ",":
            yield from _comma(cursor, out)
            if cursor.char == "]":
                raise Malformed
        elif cursor.char != "]":
            raise Malformed
    out.add("]")
    out.settle()
    yield


def _comma(cursor: Cursor, out: JsonText) -> Steps[None]:
    out.add(",")
    out.settle()
    yield
    yield from _space(cursor, out)


def _value(cursor: Cursor, out: JsonText, depth: int) -> Steps[None]:
    char = cursor.char
    if char == '"':
        yield from read_string(cursor, out, settles=True)
    elif char == "{":
        yield from read_object(cursor, out, depth)
        yield
    elif char == "[":
        yield from _array(cursor, out, depth)
    elif char in _WORDS:
        for expected in _WORDS[char]:
            if cursor.char != expected:
                raise Malformed
            out.add(expected)
            yield
    else:
        yield from _number(cursor, out)


def _number(cursor: Cursor, out: JsonText) -> Steps[None]:
    text = ""
    while cursor.char and cursor.char in "0123456789+-.eE":
        text += cursor.char
        yield
    if not _NUMBER.fullmatch(text):
        raise Malformed
    out.add(text)


def _space(cursor: Cursor, out: JsonText) -> Steps[None]:
    while cursor.char and cursor.char in WHITESPACE:
        out.add(cursor.char)
        yield


def read_string(cursor: Cursor, out: JsonText, settles: bool = False) -> Steps[None]:
    """``settles``: its characters are given away one by one. A key's are not, before the value has begun."""
    if cursor.char != '"':
        raise Malformed
    is_open = False
    while not (is_open and cursor.char == '"'):
        is_open = True
        if cursor.char == "\\":
            yield from _begin_escape(cursor, out)
        elif cursor.char < " ":
            if not cursor.char:
                raise Malformed
            out.add(json.dumps(cursor.char)[1:-1])
        else:
            out.add(cursor.char)
        if settles:
            out.settle()
        yield
    out.add('"')
    if settles:
        out.settle()
    yield


def _begin_escape(cursor: Cursor, out: JsonText) -> Steps[None]:
    """Stops at the escape's last character, which has been added."""
    out.add("\\")
    yield
    if cursor.char == "u":
        out.add("u")
        for _ in range(4):
            yield
            if not cursor.char or cursor.char not in _HEX:
                raise Malformed
            out.add(cursor.char)
    elif cursor.char and cursor.char in _ESCAPES:
        out.add(cursor.char)
    else:
        raise Malformed
