"""What a choice shows, however the tokens come: cutting the full text is the definition."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.calls import Delta
from cluster.frontend.choice import Choice
from cluster.frontend.detokenizer import Detokenizer, decode_text
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.tokenizer import Tokenizer
from engine.request import FinishReason, Output, TopLogprobs
from tests.frontend.test_stop_strings import cut


def outputs_of(ids: list[int], sizes: list[int], stop_token_id: int | None) -> list[Output]:
    """Token t has log-probability -t, so that a mix-up shows."""
    whole = [*ids, stop_token_id] if stop_token_id is not None else list(ids)
    outputs: list[Output] = []
    while whole or not outputs:
        size = sizes.pop(0) if sizes else 1
        part, whole = whole[:size], whole[size:]
        ended = not whole
        reason = None
        if ended:
            reason = FinishReason.LENGTH if stop_token_id is None else FinishReason.STOP
        logprobs = [TopLogprobs(-float(id_), 1, [], []) for id_ in part]
        outputs.append(Output("r", part, reason, stop_token_id if ended else None, logprobs))
    return outputs


def run(choice: Choice, outputs: list[Output], takes: list[bool]) -> list[Delta]:
    deltas: list[Delta] = []
    for output in outputs:
        choice.feed(output)
        if choice.finished is not None or not takes or takes.pop(0):
            deltas += [delta for delta in [choice.take_delta()] if delta is not None]
        if choice.finished is not None:
            break
    assert choice.take_delta() is None
    return deltas


@given(data=st.data())
def test_streamed_text_is_the_full_text_cut(loaded: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["byte-level", "sentencepiece"]))
    tokenizer: Tokenizer = loaded[kind]
    alphabet = st.sampled_from(["a", "b", "é", "日", "🙂", " ", "the", "fox"])
    text = "".join(data.draw(st.lists(alphabet, max_size=12)))
    stops = data.draw(st.lists(st.lists(alphabet, min_size=1, max_size=3).map("".join), max_size=3))
    ids = tokenizer.encode(text, add_special_tokens=False)
    end = data.draw(st.sampled_from([None, min(tokenizer.special_ids)]))
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=12))
    takes = data.draw(st.lists(st.booleans(), max_size=12))

    choice = Choice(0, Detokenizer(tokenizer.bytes), StopStrings(stops), wants_logprobs=True)
    deltas = run(choice, outputs_of(ids, sizes, end), takes)

    full = b"".join(map(tokenizer.bytes.visible, ids)).decode()
    shown, matched = cut(full, stops)
    assert "".join(delta.text for delta in deltas) == shown
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert choice.finished is not None
    assert choice.finished.stop_string == matched
    tokens = [token_id for delta in deltas for token_id in delta.token_ids]
    whole = [*ids, end] if end is not None else ids
    assert tokens == whole[: len(tokens)]
    assert choice.num_tokens == len(tokens)
    if matched is None:
        assert tokens == whole
        assert choice.finished.stop_token_id == end
        assert choice.finished.reason is (FinishReason.LENGTH if end is None else FinishReason.STOP)
    else:
        # The tokens up to the one that completed the stop string, and none after it.
        assert choice.finished.reason is FinishReason.STOP
        assert matched in decode_text(tokenizer.bytes, tokens) or tokenizer.bytes.strips_leading_space
        before = b"".join(map(tokenizer.bytes.visible, tokens[:-1])).decode("utf-8", "ignore")
        assert cut(before, stops)[1] is None
    position = 0
    for delta in deltas:
        assert delta.position == position
        assert delta.logprobs is not None
        assert [entry.logprob for entry in delta.logprobs] == [-id_ for id_ in delta.token_ids]
        position += len(delta.token_ids)
    offsets = [offset for delta in deltas for offset in delta.text_offsets]
    for index, offset in enumerate(offsets):
        before = b"".join(map(tokenizer.bytes.visible, ids[:index])).decode("utf-8", "ignore")
        assert offset == len(before)


def test_a_token_inside_a_character_waits_for_the_rest(loaded: Any) -> None:
    tokenizer: Tokenizer = loaded["byte-level"]
    byte_ids = {tokenizer.bytes.raw(i): i for i in range(300) if len(tokenizer.bytes.raw(i)) == 1}
    ids = [byte_ids[bytes([byte])] for byte in "a🙂b".encode()]
    choice = Choice(0, Detokenizer(tokenizer.bytes), StopStrings([]))
    seen = []
    for token_id in ids:
        choice.feed(Output("r", [token_id]))
        delta = choice.take_delta()
        seen.append((delta.text, len(delta.token_ids)) if delta else None)
    assert seen == [("a", 1), None, None, None, ("🙂", 4), ("b", 1)]


def test_stop_strings_are_ignored_before_min_tokens(tiny: Tokenizer) -> None:
    ids = tiny.encode("stop stop", add_special_tokens=False)
    first = tiny.encode("stop", add_special_tokens=False)
    choice = Choice(0, Detokenizer(tiny.bytes), StopStrings(["stop"]), min_tokens=len(first))
    choice.feed(Output("r", ids, FinishReason.LENGTH))
    delta = choice.take_delta()
    assert delta is not None
    assert delta.text == "stop "
    assert choice.finished is not None
    assert choice.finished.stop_string == "stop"
