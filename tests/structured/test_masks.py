"""The sampling rank's masks by themselves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import InvalidOption
from engine.executor.grammar_masks import GrammarMasks
from engine.executor.grammar_matcher import BACKENDS, DEFAULT_BACKEND, open_compiler
from engine.executor.sampler import sample
from engine.executor.sampling_row import GrammarMask, SamplingRow
from engine.request import Grammar, GrammarKind, SamplingParams
from engine.slot_table import ScheduledSlot, SlotState
from tests.gguf.tokenizers_for_gguf import from_tokenizer_json, write_tokenizer
from tests.structured.engine_bed import FILES, TINY, TOKENIZER, regex

WAIT_S = 30.0
END = FILES.eos_ids[0]


def a_slot(grammar: Grammar | None, text: str = "", slot: int = 0, sample: bool = True) -> ScheduledSlot:
    sampling = SamplingParams(max_tokens=50, stop_token_ids=(END,), grammar=grammar)
    generated = TOKENIZER.encode(text, add_special_tokens=False)
    return ScheduledSlot(slot, SlotState([5, *generated], 1, sampling, [], []), 0, 1, sample)


def mask_of(masks: GrammarMasks, share: ScheduledSlot) -> GrammarMask:
    future = masks.begin([share])
    assert future is not None
    found = future.result(WAIT_S)[share.slot]
    assert isinstance(found, GrammarMask), found
    return found


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("text", ["", "1", "12:", "12:34"])
def test_every_token_that_is_allowed_continues_the_text(text: str, backend: str, tmp_path: Path) -> None:
    """As Python's own expressions say; and a GGUF file's tokenizer gives the same."""
    grammar = regex("[0-9]{2}:[0-9]{2}")
    # Vocabularies are padded: here with one token more than there are.
    found = mask_of(GrammarMasks(TINY, 2049, backend), a_slot(grammar, text))
    for token_id in range(2048):
        piece = TOKENIZER.bytes.visible(token_id).decode("utf-8", "replace")
        is_beginning = re.fullmatch("[0-9]{0,2}|[0-9]{2}:[0-9]{0,2}", text + piece) is not None
        is_end = token_id == END and text == "12:34"
        assert found.allowed[token_id] == ((bool(piece) and is_beginning) or is_end), (piece, token_id)
    assert not found.allowed[2048] and found.only_ends == (text == "12:34")
    file = write_tokenizer(tmp_path / "m.gguf", from_tokenizer_json(TINY, "qwen2"))
    assert np.array_equal(mask_of(GrammarMasks(file, 2049, backend), a_slot(grammar, text)).allowed, found.allowed)


def test_a_slot_is_forgotten_before_it_is_used_again() -> None:
    masks = GrammarMasks(TINY, 2048)
    assert masks.begin([a_slot(None)]) is None
    first = a_slot(regex("ab"), "a")
    assert mask_of(masks, first).allowed.any()
    masks.forget([0])
    assert mask_of(masks, a_slot(regex("xy"))).allowed[TOKENIZER.encode("x", add_special_tokens=False)[0]]


def test_a_chunk_of_a_prompt_has_no_mask_but_tells_of_an_error() -> None:
    masks = GrammarMasks(TINY, 2048)
    future = masks.begin([a_slot(regex("a"), sample=False), a_slot(regex("("), slot=1, sample=False)])
    assert future is not None
    found = future.result(WAIT_S)
    assert found.keys() == {1} and "unclosed group" in str(found[1])


def test_a_checkpoint_without_a_tokenizer_fails_the_request(tmp_path: Path) -> None:
    future = GrammarMasks(tmp_path, 2048).begin([a_slot(regex("a"))])
    assert future is not None
    assert "tokenizer.json" in str(future.result(WAIT_S)[0])


def test_what_comes_after_the_end_is_not_held_to_anything() -> None:
    """A plan in flight when the end was sampled: its token is thrown away."""
    masks = GrammarMasks(TINY, 2048)
    share = a_slot(regex("ab"), "ab")
    assert np.flatnonzero(mask_of(masks, share).allowed).tolist() == [END]
    share.state.token_ids.append(END)
    assert mask_of(masks, share).allowed.all()


def test_rows_are_sampled_from_what_their_masks_allow() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    allowed = np.zeros(50, dtype=np.bool_)
    allowed[[7, 9]] = True
    params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=(7, 9), temperature=0.0, logprobs=0)
    free = SamplingRow(0, params, [1], 1)
    ending = SamplingRow(1, params, [1], 1, GrammarMask(allowed, only_ends=True))
    going_on = SamplingRow(2, params, [1], 1, GrammarMask(allowed | (np.arange(50) == 3), only_ends=False))
    output = sample(logits.clone(), [free, ending, going_on])
    best = int(logits[1, [7, 9]].argmax())
    assert output.token_ids[1:] == [[7, 9][best], 3]
    assert output.token_ids[:1] == sample(logits[:1].clone(), [free]).token_ids
    found = output.logprobs[1]
    assert found is not None
    assert found.logprob == pytest.approx(logits[1, [7, 9]].log_softmax(-1)[best].item(), abs=1e-6)


_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
_CASES = [
    (Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_SCHEMA)), '{"name": "Zora", "ages": [1, 22]}'),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"enum": ["red", "blue"]}'), '"blue"'),
    (Grammar(GrammarKind.REGEX, "[a-c]+(x|yz)"), "abcayz"),
    (Grammar(GrammarKind.GBNF, 'root ::= ("ab" | "c") [0-9]+'), "ab42"),
    (Grammar(GrammarKind.LARK, 'start: "ab" NUMBER\nNUMBER: /[0-9]+/'), "ab42"),
]


@pytest.mark.parametrize(("grammar", "text"), _CASES, ids=[f"{grammar.kind}-{text}" for grammar, text in _CASES])
def test_both_libraries_follow_the_same_text_to_its_end(grammar: Grammar, text: str) -> None:
    matchers = [open_compiler(backend, TINY).matcher(grammar) for backend in sorted(BACKENDS)]
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        masks = [matcher.allowed() for matcher in matchers]
        assert all(mask[token_id] for mask in masks)
        # They may differ in white space and in numbers' forms; never by much.
        assert np.count_nonzero(masks[0] != masks[1]) <= 40
        for matcher in matchers:
            matcher.accept(token_id)
    assert all(matcher.may_end for matcher in matchers)
    wrong = TOKENIZER.encode("}", add_special_tokens=False)[0]
    for matcher in matchers:
        with pytest.raises(ValueError, match="(?i)grammar|parser"):
            matcher.accept(wrong)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_what_cannot_be_compiled_is_a_value_error(backend: str) -> None:
    with pytest.raises(ValueError, match="."):
        open_compiler(backend, TINY).matcher(regex("("))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "other", "engine.executor.no_such_module")
    with pytest.raises(InvalidOption, match=r"pip install remuda\[other\]"):
        open_compiler("other", TINY)
    assert DEFAULT_BACKEND in BACKENDS
