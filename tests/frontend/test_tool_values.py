"""The readers of arguments, piece by piece, against Python's own: literals and JSON."""

import ast
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.tools.cursor import Cursor, Malformed, Steps
from cluster.frontend.tools.json_text import JsonText, read_object
from cluster.frontend.tools.python_literal import read_literal
from tests.frontend.test_tool_parser import TEXTS, VALUES


def run(steps: Steps[Any], cursor: Cursor, text: str) -> Any:
    """The reader's result, or Malformed; it must have read all."""
    for char in [*text, ""]:
        cursor.char = char
        try:
            next(steps)
        except StopIteration as end:
            if char:
                raise Malformed from end
            return end.value
        except Malformed:
            raise
    raise Malformed


@given(st.one_of(VALUES.map(repr), st.text("[](){}'\"\\nxu0123.,:- eETrueNoneFals", max_size=14)))
def test_literals_are_pythons(text: str) -> None:
    cursor = Cursor()
    try:
        ours = run(read_literal(cursor), cursor, text)
    except Malformed:
        ours = Malformed
    try:
        theirs = ast.literal_eval(text.lstrip() if text[:1].isspace() else text)
    except (ValueError, SyntaxError, TypeError, MemoryError):
        theirs = Malformed
    if ours is not Malformed and theirs is not Malformed:
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    if text.startswith(("{'", '{"', "[", "'", '"')) and ours is Malformed and theirs is not Malformed:
        # Narrower on purpose: sets, keys that are no strings, bytes, sums, strings side by side.
        assert repr(theirs) != text


@given(
    st.one_of(
        st.dictionaries(TEXTS, VALUES, max_size=3).map(json.dumps),
        st.text('{}[]":,\\unr0123.-eE a\n', max_size=16).map("{{{}}}".format),
    )
)
def test_json_is_jsons(text: str) -> None:
    cursor = Cursor()
    out = JsonText()

    def whole() -> Steps[None]:
        yield from read_object(cursor, out)
        yield

    try:
        run(whole(), cursor, text)
        ours = True
    except Malformed:
        ours = False
    try:
        theirs = isinstance(json.loads(text, strict=False), dict)
    except ValueError:
        theirs = False
    assert ours is theirs
    if ours:
        assert json.loads(out.text) == json.loads(text, strict=False)
