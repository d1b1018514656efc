"""Incremental text against the tokenizers library's decoding of the whole."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.detokenizer import Detokenizer, decode_text
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import CheckpointError

BYTE_LEVEL = ["byte-level", "tiny"]


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.bytes, context or [])
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_tokenizer(kind: str, loaded: Any, data: st.DataObject) -> None:
    """Also tokens that no text would give, whose bytes are no UTF-8."""
    tokenizer: Tokenizer = loaded[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer._original.get_vocab_size() - 1), max_size=30))
    expected = tokenizer._original.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, ids)) == expected
    assert decode_text(tokenizer.bytes, ids) == expected
    assert decode_text(tokenizer.bytes, ids, True) == tokenizer._original.decode(ids, skip_special_tokens=False)


@given(text=st.text(max_size=40))
def test_texts_of_a_sentencepiece_tokenizer(loaded: Any, text: str) -> None:
    """Most of these characters are not in its vocabulary and become byte tokens."""
    tokenizer: Tokenizer = loaded["sentencepiece"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer._original.decode(ids, skip_special_tokens=True)
    assert decode_text(tokenizer.bytes, ids) == expected
    assert "".join(streamed(tokenizer, ids)).removeprefix(" ") == expected


@pytest.mark.parametrize("kind", ["byte-level", "tiny", "sentencepiece"])
@given(data=st.data())
def test_no_piece_splits_a_character(kind: str, loaded: Any, data: st.DataObject) -> None:
    tokenizer: Tokenizer = loaded[kind]
    text = data.draw(st.text(st.sampled_from("aé日🙂👩‍ \n"), max_size=20))
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""
    joined = "".join(pieces)
    assert joined == text or (tokenizer.bytes.strips_leading_space and joined == f" {text}")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(data=st.data())
def test_a_continuation_finishes_the_prompt_s_character(kind: str, loaded: Any, data: st.DataObject) -> None:
    tokenizer: Tokenizer = loaded[kind]
    text = data.draw(st.text(st.sampled_from("aé日🙂 "), min_size=1, max_size=12))
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    before = b"".join(map(tokenizer.bytes.visible, ids[:cut])).decode("utf-8", "ignore")
    after = "".join(streamed(tokenizer, ids[cut:], ids[:cut]))
    whole = b"".join(map(tokenizer.bytes.visible, ids)).decode()
    assert before + after == whole


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(data=st.data())
def test_tokens_in_one_go_give_the_same_text_or_nothing(kind: str, loaded: Any, data: st.DataObject) -> None:
    """However the sequence is cut; None only where a piece begins or ends inside a character."""
    tokenizer: Tokenizer = loaded[kind]
    text = data.draw(st.text(st.sampled_from("aé日🙂 "), min_size=1, max_size=12))
    ids = tokenizer.encode(text, add_special_tokens=False)
    one_by_one, at_once = Detokenizer(tokenizer.bytes), Detokenizer(tokenizer.bytes)
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        begins_inside = one_by_one.is_inside_character
        expected = "".join(map(one_by_one.feed, ids[:count]))
        found = at_once.feed_whole(ids[:count])
        assert (found is None) == (begins_inside or one_by_one.is_inside_character)
        assert ("".join(map(at_once.feed, ids[:count])) if found is None else found) == expected
        del ids[:count]


def test_an_unfinished_character_at_the_end_is_shown_as_such(loaded: Any) -> None:
    tokenizer: Tokenizer = loaded["byte-level"]
    first = next(i for i in range(300) if tokenizer.bytes.raw(i) == "🙂".encode()[:1])
    assert streamed(tokenizer, [first]) == ["", "\ufffd"]


def test_padding_ids_have_no_text(tiny: Tokenizer) -> None:
    assert decode_text(tiny.bytes, [10**6]) == ""


def test_other_decoders_are_refused() -> None:
    with pytest.raises(CheckpointError, match="WordPiece"):
        TokenBytes({0: "a"}, frozenset(), {"type": "WordPiece", "prefix": "##"})
    with pytest.raises(CheckpointError, match="none"):
        TokenBytes({0: "a"}, frozenset(), {})
