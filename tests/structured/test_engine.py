"""Structured answers of a real model on the engine: they follow their grammar to the end, whatever happens."""

import json
import math
import re
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import GrammarBackend
from engine.errors import InvalidRequest
from engine.grammar import check_grammar
from engine.request import FinishReason, Grammar, GrammarKind, Request
from tests.structured.engine_bed import FILES, PROMPT, TOKENIZER, Bed, ids_of, regex, request, text_of

_NAMES = st.text('abcxyz é"\\{', min_size=1, max_size=4)
_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "sea/ü"}, {"enum": [1, "two", None, [3]]}]),
    st.integers(0, 6).map(lambda length: {"type": "string", "maxLength": length}),
    st.sampled_from(["[a-f]{3}", "^x+y$"]).map(lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 9}),
    st.tuples(st.integers(-50, 50), st.integers(0, 900)).map(
        lambda low: {"type": "integer", "minimum": low[0], "maximum": low[0] + low[1]}
    ),
)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(_NAMES, inner, max_size=3).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": required,
                    "additionalProperties": False,
                }
            )
            if properties
            else st.just({"type": "object", "additionalProperties": False})
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda made: {"type": "array", "items": made[0], "minItems": made[1], "maxItems": 2}
    )
    unions = st.lists(inner, min_size=2, max_size=3).map(lambda made: {"anyOf": made})
    return st.one_of(objects, objects, arrays, unions)


SCHEMAS = st.recursive(_LEAVES, _nested, max_leaves=6)


def schema_grammar(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(SCHEMAS, min_size=6, max_size=8), seed=st.integers(0, 99))
def test_answers_follow_random_schemas(bed: Bed, schemas: list[dict[str, Any]], seed: int) -> None:
    asked = [
        request(str(number), schema_grammar(schema), seed=seed, max_tokens=600) for number, schema in enumerate(schemas)
    ]
    for name, text in bed.texts(*asked).items():
        jsonschema.validate(json.loads(text), schemas[int(name)])


def test_each_request_of_a_batch_has_its_own(bed: Bed) -> None:
    lark = Grammar(GrammarKind.LARK, 'start: "yes" | "no" ("!" | "?")')
    gbnf = Grammar(GrammarKind.GBNF, 'root ::= item ("," item)?\nitem ::= [a-c] | "é"')
    free = request("free", None, max_tokens=20, temperature=0.0)
    alone = ids_of(bed.run(free)["free"])
    found = bed.run(
        request("date", regex(r"[0-9]{4}-[01]\d")), free, request("lark", lark), request("gbnf", gbnf, temperature=0.0)
    )
    assert re.fullmatch(r"[0-9]{4}-[01]\d", text_of(found["date"]))
    assert text_of(found["lark"]) in {"yes", "no!", "no?"}
    assert re.fullmatch("[a-cé](,[a-cé])?", text_of(found["gbnf"]))
    assert ids_of(found["free"]) == alone


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_makes_no_difference(bed: Bed, depth: int) -> None:
    asked = [request(str(seed), regex("[a-z]{2,9}( [a-z]{2,9}){3}"), seed=seed) for seed in range(3)]
    other = Bed(depth=depth)
    try:
        assert other.texts(*asked) == bed.texts(*asked)
    finally:
        other.close()


def test_replay_after_preemption_and_failover_gives_the_same_text(bed: Bed) -> None:
    asked = [request(str(seed), regex("([a-z]{2,9} ){6}end"), seed=seed, max_tokens=30) for seed in range(6)]
    expected = bed.texts(*asked)
    small = Bed(kv_cache_memory_bytes=360_000)
    try:
        assert small.texts(*asked) == expected
        assert small.engine.stats().num_preemptions > 0
    finally:
        small.close()
    # As after the loss of a gang: the tokens so far come with the request.
    whole = ids_of(bed.run(asked[0])["0"])
    cut = len(whole) // 2
    resumed = Request("0", PROMPT + whole[:cut], len(PROMPT), asked[0].sampling)
    assert ids_of(bed.run(resumed)["0"]) == whole[cut:]


@pytest.mark.parametrize("grammar", [regex("[ab]{2}"), Grammar(GrammarKind.LARK, 'start: "a" "b"')])
def test_stop_tokens_are_possible_exactly_where_the_grammar_may_end(bed: Bed, grammar: Grammar) -> None:
    """Also where they are wanted at once, or never, or where a token of the text itself is one."""
    own = TOKENIZER.encode("b", add_special_tokens=False)[0]
    asked = [
        request("eager", grammar, logit_bias=dict.fromkeys(FILES.eos_ids, 100.0)),
        request("reluctant", grammar, logit_bias=dict.fromkeys(FILES.eos_ids, -100.0)),
        request("long", grammar, min_tokens=9),
        request("own", grammar, stop_token_ids=(*FILES.eos_ids, own)),
        request("other", grammar, stop_token_ids=(7,)),
    ]
    stops = {wish.request_id: wish.sampling.stop_token_ids for wish in asked}
    for name, outputs in bed.run(*asked).items():
        last = outputs[-1]
        assert last.finish_reason is FinishReason.STOP, (name, last.error)
        assert re.fullmatch("[ab]{2}", text_of(outputs)), name
        assert last.stop_token_id in stops[name]


def test_min_tokens_prolongs_where_the_grammar_allows_it(bed: Bed) -> None:
    wish = request("a", regex("[a-d]{1,40}"), logit_bias=dict.fromkeys(FILES.eos_ids, 100.0), min_tokens=12)
    outputs = bed.run(wish)["a"]
    assert len(ids_of(outputs)) == 13 and outputs[-1].finish_reason is FinishReason.STOP


def test_sampling_options_work_within_the_grammar(bed: Bed) -> None:
    grammar = regex("(red|green|blue)( (red|green|blue)){5}")
    plain = request("plain", grammar)
    same = msgspec.structs.replace(plain, request_id="same")
    other = request("other", grammar, choice=1)
    penalized = request("penalized", grammar, repetition_penalty=1.7, frequency_penalty=1.5)
    scored = request("scored", grammar, logprobs=3)
    found = bed.run(plain, same, other, penalized, scored)
    texts = {name: text_of(outputs) for name, outputs in found.items()}
    assert all(re.fullmatch(grammar.text, text) for text in texts.values())
    assert texts["plain"] == texts["same"] == texts["scored"] and len(set(texts.values())) >= 3
    logprobs = [entry for output in found["scored"] for entry in output.logprobs or ()]
    assert len(logprobs) == len(ids_of(found["scored"]))
    # Of what the grammar allows: in the end that is only the end tokens.
    top = dict(zip(logprobs[-1].token_ids, logprobs[-1].logprobs, strict=True))
    assert sum(math.exp(top[token_id]) for token_id in FILES.eos_ids) == pytest.approx(1.0)


def test_a_grammar_that_dies_ends_its_request_alone(bed: Bed) -> None:
    bad = Grammar(GrammarKind.LARK, "start: nothing")
    heavy = regex("a{1000000}")
    found = bed.run(
        request("bad", bad),
        request("heavy", heavy, temperature=0.0),
        request("gone", regex("a{3}"), max_tokens=20),
        request("good", regex("[xy]{3}")),
        Request("astray", PROMPT + [PROMPT[1]], len(PROMPT), request("", regex("a{3}")).sampling),
    )
    assert re.fullmatch("[xy]{3}", text_of(found["good"]))
    assert text_of(found["gone"]) == "aaa"
    for name, why in (("bad", 'unknown name: "nothing"'), ("heavy", "too many"), ("astray", f"token {PROMPT[1]}")):
        last = found[name][-1]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error is not None and "structured output cannot go on" in last.error and why in last.error
    assert bed.texts(request("next", regex("ok"))) == {"next": "ok"}


ONLY_LLGUIDANCE = (
    regex("(?i)yes"),
    regex("\\pN{2}"),
    schema_grammar({"type": "string", "pattern": "^\\p{L}{1,3}$"}),
    schema_grammar({"type": "integer", "minimum": 1, "maximum": 10**30}),
    Grammar(GrammarKind.LARK, "start: A\nA: /[a-z]+/ & /.{3}/"),
    Grammar(GrammarKind.GBNF, 'root ::= ("a" | ) "b"'),
)
BOTH = (
    regex("(ab|c){2}"),
    schema_grammar({"type": "array", "items": {"enum": ["x", 3]}, "minItems": 1, "maxItems": 2}),
    Grammar(GrammarKind.LARK, 'start: "yes" | "no" ("!" | "?")'),
    Grammar(GrammarKind.GBNF, 'root ::= item ("," item)?\nitem ::= [a-c]'),
)


def test_what_xgrammar_cannot_follow_is_refused_by_the_check_for_it() -> None:
    """And by nothing else: what the check lets through runs, whichever of the two follows it."""
    asked = {str(number): grammar for number, grammar in enumerate((*ONLY_LLGUIDANCE, *BOTH))}
    refused: dict[GrammarBackend, set[Grammar]] = {backend: set() for backend in GrammarBackend}
    for backend in GrammarBackend:
        bed = Bed(grammar_backend=backend)
        try:
            for name, outputs in bed.run(*(request(name, grammar) for name, grammar in asked.items())).items():
                if outputs[-1].finish_reason is FinishReason.ERROR:
                    refused[backend].add(asked[name])
                    with pytest.raises(InvalidRequest, match=r"p cannot be compiled.*: xgrammar cannot compile it: "):
                        check_grammar(asked[name], "p", backend)
                else:
                    check_grammar(asked[name], "p", backend)
        finally:
            bed.close()
    assert refused == {GrammarBackend.LLGUIDANCE: set(), GrammarBackend.XGRAMMAR: set(ONLY_LLGUIDANCE)}


def test_what_the_engine_refuses(bed: Bed) -> None:
    with pytest.raises(InvalidRequest, match="leave ignore_eos out"):
        bed.engine.add(request("a", regex("a"), stop_token_ids=()))
    with pytest.raises(InvalidRequest, match="65536 characters, not 65537"):
        bed.engine.add(request("a", regex("a" * 65537)))
