"""Tool calls in a model's text: every form, in any pieces; what is none comes back as text, complete and in order."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.calls import ToolCallDelta
from cluster.frontend.tools.grammar import OPENING, TOKENS
from cluster.frontend.tools.parser import ToolCallParser

NAMES = ["f", "get_weather", "brave_search", "mcp.read-file"]


def parse(pieces: list[str], only_first: bool = False) -> tuple[str, list[tuple[str, str]], int]:
    """Content, (name, argument text) of each call, and how many of them are complete."""
    parser = ToolCallParser(NAMES, only_first)
    found = []
    for piece in pieces:
        if parser.is_done:
            break
        found += parser.feed(piece)
    found += parser.finish()
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in found:
        assert piece if isinstance(piece, str) else piece.name or piece.arguments, "an empty piece"
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            assert (piece.index, piece.arguments) == (len(calls), "")
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert parser.num_calls == len(calls)
    return content, calls, parser.num_complete


FORMS = [
    ('{"name": "f", "parameters": {"n": "10"}}', [("f", '{"n": "10"}')]),
    (
        '\n{\n    "type": "function",\n    "name": "f",\n    "parameters": {\n        "n": 1\n    }\n}',
        [("f", '{\n        "n": 1\n    }')],
    ),
    ('{"id": "x", "name": "f", "arguments": {}}', [("f", "{}")]),
    ('{"parameters": {"a": [1, {"b": null}]}, "name": "f"}', [("f", '{"a": [1, {"b": null}]}')]),
    ('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}', [("f", "{}"), ("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {}}\n{"name": "f", "parameters": {}};\n', [("f", "{}"), ("f", "{}")]),
    ('{"name": "f", "parameters": {}}{"name": "f", "parameters": {}}', [("f", "{}"), ("f", "{}")]),
    (
        '[{"name": "f", "parameters": {}}, {"name": "f", "arguments": {"a":-1.5e3}}]',
        [("f", "{}"), ("f", '{"a":-1.5e3}')],
    ),
    ('<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
    (
        '<|python_tag|>brave_search.call(query="price of 1oz gold")',
        [("brave_search", '{"query": "price of 1oz gold"}')],
    ),
    (
        '<|python_tag|>f.call(a="x"); brave_search.call(query="y")',
        [("f", '{"a": "x"}'), ("brave_search", '{"query": "y"}')],
    ),
    (
        '<|python_tag|>[get_weather(city="San Francisco", metric="celsius")]',
        [("get_weather", '{"city": "San Francisco", "metric": "celsius"}')],
    ),
    ('<function=f>{"n": 10}</function>', [("f", '{"n": 10}')]),
    ('<function=f>{"n": 10}</function>\n<function=f>{}</function>', [("f", '{"n": 10}'), ("f", "{}")]),
    (
        "[get_weather(city='San Francisco', metric='celsius'), get_weather(city='Seattle', metric='celsius')]",
        [
            ("get_weather", '{"city": "San Francisco", "metric": "celsius"}'),
            ("get_weather", '{"city": "Seattle", "metric": "celsius"}'),
        ],
    ),
    ("[f(), mcp.read-file(path='/a')]", [("f", "{}"), ("mcp.read-file", '{"path": "/a"}')]),
    (
        "[ f( a = -1 , b=[True, (None, .5), {'k': 'é\\n\\u00e9'}], ) ]",
        [("f", '{"a": -1, "b": [true, [null, 0.5], {"k": "é\\né"}]}')],
    ),
    ("<|python_start|>[f(a=1)]<|python_end|>", [("f", '{"a": 1}')]),
    (
        '<|python_start|><|python_end|>{"name": "f", "parameters": {}}{"name": "f", "parameters": {}}',
        [("f", "{}"), ("f", "{}")],
    ),
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        [("f", '{"a": "b"}'), ("f", "{}")],
    ),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', [("f", '{"a": 1}')]),
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        [("f", '{"a": 1}'), ("f", "{}")],
    ),
    ('{"name": "f", "parameters": {"code": "a\nb"}}', [("f", '{"code": "a\\nb"}')]),
]


@pytest.mark.parametrize(("text", "calls"), FORMS)
def test_every_form(text: str, calls: list[tuple[str, str]]) -> None:
    expected = ("", calls, len(calls))
    assert parse([text]) == expected
    assert parse(list(text)) == expected
    for cut in range(len(text)):
        assert parse([text[:cut], text[cut:]]) == expected


@pytest.mark.parametrize(("text", "calls"), FORMS)
def test_one_call_only(text: str, calls: list[tuple[str, str]]) -> None:
    assert parse([text], only_first=True) == ("", calls[:1], 1)
    parser = ToolCallParser(NAMES, only_first=True)
    num_fed = 0
    while not parser.is_done:
        parser.feed(text[num_fed])
        num_fed += 1
    # At its closing bracket, without a look at what follows.
    assert text[num_fed - 1] in "})"
    assert len(parse([text[:num_fed]])[1]) == 1


PLAIN = [
    "",
    "  \n",
    "Hello [1] <b>bold</b> {x}",
    '{"answer": 42}',
    '{"name": "unknown", "parameters": {}}',
    '{"name": "f"}',
    '{"name": "f", "parameters": null}',
    '{"name": "f", "parameters": "{}"}',
    '{"name": "f", "parameters": {"a": nope}}',
    '{"name": "f", "parameters": {,}}',
    '{"name": "f", "name": "f", "parameters": {}}'[:30],
    "[1, 2, 3]",
    "[f]",
    "[f(1)]",
    "[f(a)]",
    "[f(a=b)]",
    "[f(a=1+1)]",
    "[f(a=__import__('os').system('true'))]",
    "[unknown(a=1)]",
    "[]",
    "f(a=1)",
    "<|python_tag|>import os\nprint(os.name)",
    "<|python_start|>x = 1<|python_end|>",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_call>",
    "<function=unknown>{}</function>",
    "<function=f>[]</function>",
    "[TOOL_CALLS][]",
    "</tool_call>",
    'The call would be {"name": "f", "parameters": {}}.',
    "As in [f(a=1)]",
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse([text]) == (text, [], 0)
    assert parse(list(text)) == (text, [], 0)


def test_text_before_a_mark_and_after_calls() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse([f"Let me see.\n{call}"]) == ("Let me see.\n", [("f", "{}")], 1)
    assert parse([f"{call}\n\nDone; [f(a=1)]"]) == ("\n\nDone; [f(a=1)]", [("f", "{}")], 1)
    assert parse([f"{call} and {call}"]) == (" and ", [("f", "{}"), ("f", "{}")], 2)
    assert parse(["<|python_start|>I think<|python_end|>[f(a=1)]"]) == (
        "<|python_start|>I think",
        [("f", '{"a": 1}')],
        1,
    )
    assert parse(["<tool_call><tool_call>{x <|python_tag|>f()"]) == ("<tool_call><tool_call>{x ", [("f", "{}")], 1)


def test_what_goes_wrong_after_a_call_has_begun_is_text_from_there_on() -> None:
    assert parse(['{"name": "f", "parameters": {"a": 1, "b": nope}}']) == (' "b": nope}}', [("f", '{"a": 1,')], 0)
    assert parse(["[f(a=1, b=c)]"]) == (" b=c)]", [("f", '{"a": 1')], 0)
    assert parse(["[f(a=1), unknown()]"]) == (", unknown()]", [("f", '{"a": 1}')], 1)
    parser = ToolCallParser(NAMES)
    parser.feed('{"name": "f", "parameters": {"a": "x')
    parser.finish()
    assert (parser.num_calls, parser.has_only_complete_calls) == (1, False)


def test_no_more_is_held_back_than_needed() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("A") == ["A"]
    assert parser.feed(" [b] <i> [f(") == [" [b] <i> [f("]
    assert parser.feed("<too") == []
    assert parser.feed("th") == ["<tooth"]
    assert ToolCallParser(NAMES).feed("[get_wander") == ["[get_wander"]
    assert ToolCallParser(NAMES).feed('{"answer":') == ['{"answer":']
    parser = ToolCallParser(NAMES)
    assert parser.feed('{"name": "f", "parameters": {"key"') == []
    assert parser.feed(': "') == [ToolCallDelta(0, "f", ""), ToolCallDelta(0, None, '{"key": "')]
    assert parser.feed("ab") == [ToolCallDelta(0, None, "ab")]
    assert parser.feed("\\u00") == []
    assert parser.feed('e9"') == [ToolCallDelta(0, None, '\\u00e9"')]
    assert parser.feed(', "n": 12') == [ToolCallDelta(0, None, ",")]
    assert parser.feed("3}") == [ToolCallDelta(0, None, ' "n": 123}')]
    parser = ToolCallParser(NAMES)
    assert parser.feed("[f(a=1") == []
    assert parser.feed(", b=") == [ToolCallDelta(0, "f", ""), ToolCallDelta(0, None, '{"a": 1')]
    assert parser.feed("'x')") == [ToolCallDelta(0, None, ', "b": "x"}')]


TEXTS = st.text(st.sampled_from("ab\"'\\\n\t{}[]()<>|=,;:. é日🙂\x00/-"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KEYWORDS = st.sampled_from(["a", "b", "city", "ключ", "_x1"])
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(KEYWORDS, VALUES, max_size=3)), min_size=1, max_size=3
)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, dict[str, Any]]]]:
    """A text with calls in some form, its content, and the calls; json and repr are the writers."""
    calls = draw(CALLS)
    key = draw(st.sampled_from(["parameters", "arguments"]))
    indent = draw(st.sampled_from([None, 2]))
    ascii_only = draw(st.booleans())
    objects = [json.dumps({"name": n, key: a}, indent=indent, ensure_ascii=ascii_only) for n, a in calls]
    pythonic = "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"
    bare = [
        draw(st.sampled_from([";", "; ", "\n", ""])).join(objects),
        "[" + ", ".join(objects) + "]",
        pythonic,
        f"<|python_start|>{pythonic}<|python_end|>",
    ]
    tags = [f"<function={n}>{json.dumps(a, ensure_ascii=ascii_only)}</function>" for n, a in calls]
    marked = [
        "<|python_tag|>" + ";".join(objects),
        f"<|python_tag|>{pythonic}",
        "\n".join(tags),
        "\n".join(f"<tool_call>\n{entry}\n</tool_call>" for entry in objects),
        "[TOOL_CALLS][" + ", ".join(objects) + "]",
    ]
    form = draw(st.sampled_from(bare + marked))
    prose = draw(st.sampled_from(["", "So: ", "1 < 2 [x] {} \n"])) if form in marked else ""
    return prose + form, prose, calls


def cut_up(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(written(), st.data())
def test_calls_come_back_however_the_text_is_cut(case: tuple[str, str, Any], data: st.DataObject) -> None:
    text, prose, calls = case
    content, found, num_complete = parse(cut_up(data, text))
    assert (content, num_complete) == (prose, len(calls))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert parse([text]) == (content, found, num_complete)


@given(written(), st.data())
def test_a_text_that_breaks_off(case: tuple[str, str, Any], data: st.DataObject) -> None:
    text, prose, _ = case
    whole = parse([text])[1]
    part = text[: data.draw(st.integers(0, len(text)))]
    content, found, num_complete = parse(cut_up(data, part))
    assert parse([part]) == (content, found, num_complete)
    if not found:
        assert content == part
        return
    # What stands, stands; the last call may end early, and then a part of it may have come as text.
    assert content.startswith(prose)
    assert found[:num_complete] == whole[:num_complete]
    assert len(found) - num_complete in (0, 1)
    for (name, arguments), (whole_name, whole_arguments) in zip(found, whole, strict=False):
        assert name == whole_name
        assert whole_arguments.startswith(arguments)


FRAGMENTS = st.sampled_from(
    [*TOKENS, "<", "[", "{", "}", "]", ")", "f", "f(", "a=1", ",", ";", " ", "\n", '"name"', ":", '"f"', '"parameters"']
    + ['{"a": 1}', '"', "'", "\\", "é", "🙂", '{"name": "f", "parameters": {', "[f(a='", "<function=f>", "text"]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=14).map("".join), st.data())
def test_any_text_in_any_pieces(text: str, data: st.DataObject) -> None:
    content, calls, num_complete = parse([text])
    assert parse(cut_up(data, text)) == (content, calls, num_complete)
    assert parse(list(text)) == (content, calls, num_complete)
    for _, arguments in calls[:-1]:
        if num_complete == len(calls):
            assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text
    else:
        # In order, nothing twice: the content is what is left of the text without the calls.
        rest = iter(text)
        assert all(char in rest for char in content)


@given(
    st.lists(FRAGMENTS.filter(lambda fragment: "f" not in fragment or fragment in OPENING), max_size=14).map("".join)
)
def test_without_a_known_name_nothing_is_lost(text: str) -> None:
    parser = ToolCallParser(["other"])
    pieces = [piece for char in text for piece in parser.feed(char)] + parser.finish()
    assert "".join(map(str, pieces)) == text


@pytest.mark.parametrize(
    "text", [*OPENING, "<tool_call> \n", "<|python_tag|>f(a='", '<tool_call>{"type": "', "[f(a='<tool_call>{"]
)
def test_no_text_takes_longer_than_it_is_long(text: str) -> None:
    """Steps of the attempts, counted: what is held back is not gone through again and again."""
    parser = ToolCallParser(NAMES)
    steps = 0
    step = parser._step

    def counted(char: str) -> bool:
        nonlocal steps
        steps += 1
        return step(char)

    parser._step = counted  # type: ignore[method-assign]
    whole = text * (20_000 // len(text))
    pieces = [piece for start in range(0, len(whole), 5) for piece in parser.feed(whole[start : start + 5])]
    pieces += parser.finish()
    assert steps < 5 * len(whole)
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == whole


def test_depth_is_bounded() -> None:
    for text in ('{"name": "f", "parameters": {"a": ' + "[" * 2000, "[f(a=" + "[" * 2000, "[f(a=" + "(" * 2000):
        content, calls, _ = parse([text])
        assert (content, calls) == (text, [])
