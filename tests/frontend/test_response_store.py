"""Stored responses without a server: what is kept for how long, and that numbers mean the same in every reading."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UnknownStream
from cluster.frontend.calls import Delta, Event, Finished, Started, ToolCallDelta, Usage
from cluster.frontend.responses.form import ResponseForm
from cluster.frontend.responses.schema import CreateBody
from cluster.frontend.responses.store import ResponseStore, StoredResponse, joined
from engine.request import FinishReason

BODY = CreateBody(input="x")


def stored(name: str, owner: str = "a", size: int = 1000) -> StoredResponse:
    return StoredResponse(name, owner, BODY, [], [], 0, size)


def test_what_runs_stays_and_what_is_over_goes_with_time() -> None:
    store = ResponseStore(ttl_s=10)
    one, other = stored("one"), stored("other")
    for each in (one, other):
        store.begin(each)
    store.end(one, 100.0)
    assert store.get("one", "a", 109.9) is one
    with pytest.raises(UnknownStream, match="no longer stored"):
        store.get("one", "a", 110.0)
    assert store.get("other", "a", 1e9) is other


def test_the_oldest_make_room_by_number_and_by_bytes() -> None:
    store = ResponseStore(max_count=3, max_bytes=5000)
    for index in range(5):
        store.begin(each := stored(str(index)))
        store.end(each, float(index))
    assert [store.knows(str(index)) for index in range(5)] == [False, False, True, True, True]
    store.begin(large := stored("large", size=4500))
    store.end(large, 5.0)
    assert [store.knows(name) for name in ("2", "3", "4", "large")] == [False, False, False, True]
    assert len(store) == 1


def test_what_is_due_goes_without_anybody_asking_for_it() -> None:
    """By whatever comes next, ends, is refused or removed."""
    store = ResponseStore(ttl_s=10)

    def kept_one(name: str, now_s: float) -> None:
        store.begin(each := stored(name))
        store.end(each, now_s)

    kept_one("a", 0.0)
    kept_one("b", 10.0)
    assert not store.knows("a")
    store.begin(stored("refused"))
    store.forget("refused", 20.0)
    assert not store.knows("b") and not store.knows("refused") and len(store) == 0
    kept_one("c", 30.0)
    store.remove("d", 40.0)
    assert not store.knows("c") and store.knows("d")
    store.begin(stored("another"))
    store.forget("another", 100.0)
    assert not store.knows("d"), "no leader has it any more"


def test_one_tenants_many_cost_the_others_nothing() -> None:
    by_number, by_bytes = ResponseStore(max_count=10), ResponseStore(max_bytes=10_000)
    for store, size in ((by_number, 10), (by_bytes, 1000)):
        for index in range(60):
            owner = "small" if index in (0, 1) else "flood"
            store.begin(each := stored(str(index), owner, size))
            store.end(each, float(index))
        for index in (0, 1, 59):
            assert store.knows(str(index))
        assert not store.knows("2"), "of who has most the oldest go first"
        assert len(store) == 10
        store.remove("0", 60.0)
        store.remove("1", 60.0)
        store.begin(huge := stored("huge", "huge", 20_000))
        store.end(huge, 61.0)
        assert store.knows("huge") == (store is by_number)
        assert store.knows("59"), "what fits nowhere makes nobody's room"


def test_only_its_tenant_sees_a_response_and_what_was_removed_stays_away() -> None:
    store = ResponseStore()
    store.begin(one := stored("one", owner="a"))
    with pytest.raises(UnknownStream):
        store.get("one", "b", 0.0)
    store.remove("one", 0.0)
    store.end(one, 1.0)
    assert store.knows("one") and len(store) == 0, "leaders are not asked for it either"
    for now_s in (1.0, 1e6):
        with pytest.raises(UnknownStream):
            store.get("one", "a", now_s)
    assert not store.knows("one"), "they have forgotten it by then"


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Text and calls in any order, said character by character."""
    said: list[Delta] = []
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "call"]), max_size=4)):
        text = draw(st.text("ab\n🙂", max_size=6))
        if kind == "text":
            said += [_delta(char) for char in text]
        else:
            said.append(_delta("", ToolCallDelta(num_calls, "f", "")))
            said += [_delta("", ToolCallDelta(num_calls, None, char)) for char in text]
            num_calls += 1
    return said


def _delta(text: str, *calls: ToolCallDelta) -> Delta:
    return Delta(0, text, (), None, 0, (), calls)


def events_of(said: list[Delta], cuts: list[int]) -> list[Event]:
    """The same answer in pieces that end at the cuts."""
    ends = [*sorted(cut for cut in cuts if cut < len(said)), len(said)]
    pieces, start = [], 0
    for end in ends:
        pieces += joined(cast(list[Event], said[start:end]))
        start = end
    finished = Finished(0, FinishReason.STOP)
    return [Started("m", [[1, 2]]), *pieces, finished, Usage(2, len(said), 0)]


def reading(events: list[Event], starting_after: int = -1) -> list[dict[str, Any]]:
    form = ResponseForm("resp_1", BODY, "m", 0, cast(Any, None), starting_after)
    return [chunk for event in events for chunk in form.chunks(event)]


def by_character(chunks: list[dict[str, Any]]) -> list[tuple[int, str, Any]]:
    """Every number that was used, with what it stands for."""
    found: list[tuple[int, str, Any]] = []
    for chunk in chunks:
        number, delta = chunk["sequence_number"], chunk.get("delta")
        if delta is None:
            found.append((number, chunk["type"], chunk.get("text", chunk.get("arguments"))))
        else:
            first = number - len(delta) + 1
            found += [(first + index, chunk["type"], char) for index, char in enumerate(delta)]
    return found


@given(
    said=answers(), cuts=st.lists(st.integers(0, 24)), others=st.lists(st.integers(0, 24)), place=st.integers(-1, 60)
)
def test_numbers_mean_the_same_however_the_answer_was_cut(
    said: list[Delta], cuts: list[int], others: list[int], place: int
) -> None:
    one = reading(events_of(said, cuts))
    whole = by_character(one)
    assert by_character(reading(events_of(said, others))) == whole
    assert [number for number, _, _ in whole] == list(range(len(whole)))
    rest = by_character(reading(events_of(said, others), place))
    assert rest == whole[place + 1 :]
    final = one[-1]["response"]
    assert final["status"] == "completed"
    texts = [item["content"][0]["text"] for item in final["output"] if item["type"] == "message"]
    assert "".join(texts) == "".join(delta.text for delta in said)
    ids = [item["id"] for item in final["output"]]
    assert len(set(ids)) == len(ids)
