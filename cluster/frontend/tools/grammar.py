"""The forms in which Llama-class models write tool calls.

    {"name": "f", "parameters": {…}}            Llama 3.1; also "arguments", also one after the other or in a list
    <|python_tag|>…                             before it; or f.call(query="…")
    <function=f>{…}</function>                  Llama 3.1, when told so
    [f(a=1, b="x"), g()]                        Llama 3.2 and 4
    <|python_start|>…<|python_end|>             around it, Llama 4
    <tool_call>{…}</tool_call>                  Qwen, Hermes
    [TOOL_CALLS][{…}, {…}]                      Mistral

Each is taken from each model: which one it is shows in its first characters.
"""

import json
import re
from collections.abc import Collection

from cluster.frontend.tools.cursor import Cursor, Malformed, Steps, expect, skip_whitespace
from cluster.frontend.tools.json_text import JsonText, read_object, read_string
from cluster.frontend.tools.python_literal import read_literal, to_json

_PYTHON = ("<|python_tag|>", "<|python_start|>")
_FUNCTION = "<function="
_PYTHON_END = "<|python_end|>"
OPENING = (*_PYTHON, _PYTHON_END, "<tool_call>", _FUNCTION, "[TOOL_CALLS]")
"""What announces calls wherever it stands. Llama 4 may end a remark with <|python_end|> and then call."""
_MAX_OPENINGS = 2
"""In a row. Were more held back, each would have to be tried anew when the last turns out to announce nothing."""
_CLOSING = ("</tool_call>", "</function>", _PYTHON_END)
TOKENS = tuple(dict.fromkeys((*OPENING, *_CLOSING)))
"""Those of these that are control tokens of a tokenizer have to be kept in the text."""

_MEMBERS = ("name", "parameters", "arguments", "type", "id")
_MAX_KEYWORD_CHARS = 256
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_KEYWORD = re.compile(r"[^\W\d]\w*")


def read_calls(cursor: Cursor, names: Collection[str], is_marked: bool) -> Steps[None]:
    """All calls from here on, to the text's end.

    Args:
        cursor: at the first character.
        names: the tools that there are; another name is no call.
        is_marked: begin only at one of ``OPENING``. Else whitespace and the bare forms are taken as well.

    Raises:
        Malformed: at the first character that cannot belong to calls.
    """
    bare_names = False
    may_begin = not is_marked
    num_complete = num_openings = 0
    """Calls, and openings since the last of them."""
    while num_openings <= _MAX_OPENINGS:
        if cursor.num_complete > num_complete:
            num_complete, num_openings = cursor.num_complete, 0
        if may_begin:
            yield from skip_whitespace(cursor)
        char = cursor.char
        if not char and cursor.num_complete:
            return
        if char == "<" or (char == "[" and not may_begin):
            marker = yield from _marker(cursor)
            if marker not in OPENING and not cursor.num_complete:
                raise Malformed
            num_openings += marker in OPENING
            if marker == _FUNCTION:
                yield from _function_tag(cursor, names)
            bare_names = bare_names or marker in _PYTHON
        elif not may_begin:
            raise Malformed
        elif char == "{":
            yield from _json_call(cursor, names)
        elif char == "[":
            num_openings += yield from _bracket(cursor, names)
        elif bare_names and char in _NAME_CHARS:
            yield from _named_call(cursor, names)
        elif char and char in ";," and cursor.num_complete:
            yield
        else:
            raise Malformed
        may_begin = True
    raise Malformed


def _marker(cursor: Cursor) -> Steps[str]:
    text = ""
    while True:
        text += cursor.char
        if not cursor.char or not any(token.startswith(text) for token in TOKENS):
            raise Malformed
        if text in _CLOSING:
            cursor.close()
        yield
        if text in TOKENS:
            return text


def _function_tag(cursor: Cursor, names: Collection[str]) -> Steps[None]:
    name = yield from _name(cursor, names)
    yield from expect(cursor, ">")
    yield from skip_whitespace(cursor)
    yield from read_object(cursor, _arguments_of(cursor, name))
    cursor.complete()
    yield


def _bracket(cursor: Cursor, names: Collection[str]) -> Steps[bool]:
    """A list of calls in either form; or Mistral's mark, and then True."""
    yield
    yield from skip_whitespace(cursor)
    if cursor.char == "{":
        while True:
            yield from _json_call(cursor, names)
            if not (yield from _another(cursor)):
                return False
    choices = {*_callable(names), "TOOL_CALLS"}
    while True:
        name = yield from _name(cursor, choices)
        if name == "TOOL_CALLS" and cursor.char == "]":
            yield
            return True
        yield from _pythonic_call(cursor, name, names)
        if not (yield from _another(cursor)):
            return False


def _another(cursor: Cursor) -> Steps[bool]:
    """After an entry of a list: whether one more follows, else the list is closed."""
    yield from skip_whitespace(cursor)
    if cursor.char == ",":
        yield
        yield from skip_whitespace(cursor)
        if cursor.char != "]":
            return True
    if cursor.char != "]":
        raise Malformed
    cursor.close()
    yield
    return False


def _json_call(cursor: Cursor, names: Collection[str]) -> Steps[None]:
    """The arguments stream once the name is known; where they come first, they wait for it."""
    name: str | None = None
    arguments: JsonText | None = None
    yield from expect(cursor, "{")
    while True:
        yield from skip_whitespace(cursor)
        key = yield from _string(cursor)
        if key not in _MEMBERS:
            raise Malformed
        yield from skip_whitespace(cursor)
        yield from expect(cursor, ":")
        yield from skip_whitespace(cursor)
        if key == "name" and name is None:
            name = yield from _string(cursor)
            if name not in names:
                raise Malformed
        elif key in ("parameters", "arguments") and arguments is None:
            arguments = JsonText() if name is None else _arguments_of(cursor, name)
            yield from read_object(cursor, arguments)
            yield
        elif key in ("type", "id"):
            yield from _string(cursor)
        else:
            raise Malformed
        yield from skip_whitespace(cursor)
        if cursor.char != ",":
            break
        yield
    if cursor.char != "}" or name is None or arguments is None:
        raise Malformed
    if arguments.text:
        cursor.find(name, arguments.text)
    cursor.complete()
    yield


def _string(cursor: Cursor) -> Steps[str]:
    out = JsonText()
    yield from read_string(cursor, out)
    value: str = json.loads(out.text)
    return value


def _arguments_of(cursor: Cursor, name: str) -> JsonText:
    unsaid: list[str | None] = [name]

    def found(text: str) -> None:
        cursor.find(unsaid.pop() if unsaid else None, text)

    return JsonText(found)


def _named_call(cursor: Cursor, names: Collection[str]) -> Steps[None]:
    name = yield from _name(cursor, _callable(names))
    yield from _pythonic_call(cursor, name, names)


def _callable(names: Collection[str]) -> set[str]:
    return {*names, *(f"{name}.call" for name in names)}


def _pythonic_call(cursor: Cursor, name: str, names: Collection[str]) -> Steps[None]:
    """``f(a=1)`` from the parenthesis on; ``f.call(a=1)`` is the same. Each argument is found when it is complete."""
    name = name if name in names else name.removesuffix(".call")
    if name not in names:
        raise Malformed
    yield from expect(cursor, "(")
    yield from skip_whitespace(cursor)
    keywords: set[str] = set()
    text = "{"
    while cursor.char != ")":
        keyword = yield from _keyword(cursor)
        yield from skip_whitespace(cursor)
        yield from expect(cursor, "=")
        yield from skip_whitespace(cursor)
        value = yield from read_literal(cursor)
        yield from skip_whitespace(cursor)
        if keyword in keywords:
            raise Malformed
        text += f"{', ' if keywords else ''}{to_json(keyword)}: {to_json(value)}"
        if cursor.char != ",":
            break
        cursor.find(None if keywords else name, text)
        text = ""
        keywords.add(keyword)
        yield
        yield from skip_whitespace(cursor)
    if cursor.char != ")":
        raise Malformed
    cursor.find(None if keywords else name, text + "}")
    cursor.complete()
    yield


def _name(cursor: Cursor, choices: Collection[str]) -> Steps[str]:
    """Given up at the first character with which no choice goes on, so that prose is not held back."""
    text = ""
    while cursor.char in _NAME_CHARS:
        text += cursor.char
        if not any(choice.startswith(text) for choice in choices):
            raise Malformed
        yield
    if text not in choices:
        raise Malformed
    return text


def _keyword(cursor: Cursor) -> Steps[str]:
    text = ""
    while cursor.char and (cursor.char.isalnum() or cursor.char == "_") and len(text) < _MAX_KEYWORD_CHARS:
        text += cursor.char
        yield
    if not _KEYWORD.fullmatch(text):
        raise Malformed
    return text
