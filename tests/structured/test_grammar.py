"""Whether a grammar can be compiled, and where it cannot."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

import engine.grammar
from cluster.frontend.calls import StructuredOutput
from cluster.frontend.model_files import read_model_files
from cluster.frontend.structured import forced_call, structured_output
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import InvalidRequest
from engine.grammar import check_grammar, source_of
from engine.request import Grammar, GrammarKind
from tests.frontend import tokenizers_for_tests
from tests.structured.engine_bed import TINY, TOKENIZER

_DEEP: Any = {"type": "string"}
for _ in range(300):
    _DEEP = {"type": "array", "items": _DEEP}
_NAMED = {"properties": {"a/b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/bad~"}]}}}


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        ({"type": "objekt"}, "its root", "objekt"),
        ({"properties": {"a": {"items": {"pattern": "(x", "type": "string"}}}}, "/properties/a/items", "unclosed"),
        ({"properties": {"a": {}, "b": {"not": {}}}}, "/properties/b", "not"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}, "$defs": {"x": {}}}, "/properties/a", "gone"),
        ({**_NAMED, "$defs": {"bad~": {"uniqueItems": True}}}, "/properties/a~1b/anyOf/1", "uniqueItems"),
        ({"prefixItems": [{}, {"minimum": "x"}]}, "/prefixItems/1", "minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "its root", "greater than maximum"),
        ({"$ref": "http://example.com/schema"}, "its root", "does not fetch"),
        ({"$ref": "#"}, "its root", "no text can follow it"),
        (_DEEP, "/items" * 34, "recursion"),
    ],
)
def test_a_schema_that_cannot_be_compiled_says_where(schema: Any, place: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_grammar(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), "response_format")
    assert caught.value.param == "response_format"
    assert f"response_format cannot be compiled at {place}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (GrammarKind.JSON_SCHEMA, "{", "EOF"),
        (GrammarKind.REGEX, "(a|b", "unclosed group"),
        (GrammarKind.REGEX, "(?=a)b", "look-around"),
        (GrammarKind.REGEX, "\ud800", "surrogates"),
        (GrammarKind.LARK, 'start: "a"\n  | other', "1("),
        (GrammarKind.LARK, "start: start", "no text can follow it"),
        (GrammarKind.LARK, "start: <|eot|>", "unknown special token"),
        (GrammarKind.GBNF, 'root ::= "a" | (', "line 1"),
    ],
)
def test_other_grammars_say_where_too(kind: GrammarKind, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match="p cannot be compiled") as caught:
        check_grammar(Grammar(kind, text), "p")
    assert words in str(caught.value)


def test_size_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="at most 65536"):
        check_grammar(Grammar(GrammarKind.REGEX, "a" * 65_537), "p")
    many = {"type": "object", "properties": {f"p{number}": {} for number in range(100)}}
    monkeypatch.setattr(engine.grammar, "MAX_COMPILE_S", 1e-9)
    with pytest.raises(InvalidRequest, match="s to compile, longer than 1e-09 s"):
        check_grammar(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(many)), "p")


def follows(wish: StructuredOutput, text: str) -> bool:
    """Whether the whole text follows the grammar."""
    matcher = LLMatcher(_llguidance(), source_of(wish.grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def _llguidance() -> LLTokenizer:
    return LLTokenizer((TINY / "tokenizer.json").read_text(encoding="utf-8"))


def wanted(**fields: Any) -> StructuredOutput:
    found = structured_output(fields.pop("response_format", None), fields, fields.pop("structured_outputs", None))
    assert found is not None
    check_grammar(found.grammar, found.param)
    return found


CHOICES = ["a", "ab", 'say "hi"', "back\\slash", "new\nline", "é🙂", "/slash/", "{x}"]


def test_choices_are_taken_literally() -> None:
    wish = wanted(guided_choice=CHOICES)
    assert all(follows(wish, choice) for choice in CHOICES)
    assert not any(follows(wish, text) for text in ("", "aba", "say hi", "b", '"a"'))


@pytest.mark.parametrize("separator", [", ", ",", ",\n    "])
def test_white_space_is_free_but_bounded(separator: str) -> None:
    wish = wanted(response_format={"type": "json_object"})
    assert follows(wish, '{"a": 1' + separator + '"b": [true]}')
    assert not follows(wish, '{"a": 1,  "b": 2}') and not follows(wish, "[1]")


def test_every_field_names_its_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
    ):
        wish = wanted(**fields)
        assert follows(wish, '{"a": 5}') and not follows(wish, "{}")
    assert follows(wanted(structured_outputs={"json_object": True}), "{}")
    assert follows(wanted(guided_grammar='root ::= "x" y\ny ::= [0-9]+'), "x12")
    assert follows(wanted(guided_grammar='start: "x" /[0-9]+/'), "x12")
    assert structured_output({"type": "text"}, {"guided_json": None}, None) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_json": "{}", "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ],
)
def test_fields_that_are_wrong_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wanted(**fields)
    assert caught.value.param == param


def test_a_forced_call_follows_its_tools_schema() -> None:
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    parameters = {"properties": {"at": {"$ref": "#/$defs/point"}}, "required": ["at"], "$defs": {"point": point}}
    wish = forced_call([{"function": {"name": "go", "parameters": parameters}}, {"function": {"name": "stop.now"}}])
    check_grammar(wish.grammar, wish.param)
    assert follows(wish, '{"name": "go", "parameters": {"at": {"x": 3}}}')
    assert follows(wish, '{"name": "stop.now", "parameters": {}}')
    for wrong in ('{"name": "go", "parameters": {"at": 3}}', '{"name": "other", "parameters": {}}', "{}"):
        assert not follows(wish, wrong)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_tokens_stand_for_the_bytes_that_clients_see(kind: str, tmp_path: Any) -> None:
    path = getattr(tokenizers_for_tests, kind)(tmp_path / "m")
    ours = Tokenizer(read_model_files(path))
    theirs = LLTokenizer((path / "tokenizer.json").read_text(encoding="utf-8"))
    # 0xFF, which UTF-8 never holds, marks control tokens there.
    never = {token_id for token_id in range(theirs.vocab_size) if b"\xff" in ours.bytes.raw(token_id)}
    ids = [token_id for token_id in range(theirs.vocab_size) if token_id not in ours.special_ids | never]
    assert len(ids) > 200
    assert [theirs.decode_bytes([token_id]) for token_id in ids] == [ours.bytes.raw(token_id) for token_id in ids]
