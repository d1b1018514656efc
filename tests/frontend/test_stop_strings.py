"""Stop strings in pieces = stop strings in the whole."""

from hypothesis import example, given
from hypothesis import strategies as st

from cluster.frontend.stop_strings import StopStrings

TEXTS = st.text(st.sampled_from("abc"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=5)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the stop string whose end comes first; of those, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            matched = max(ending, key=len)
            return text[: end - len(matched)], matched
    return text, None


def pieces_of(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    while text:
        size = sizes.pop(0) if sizes else 1
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@given(TEXTS, STOPS, st.lists(st.integers(0, 6), max_size=24))
@example("aabab", ["abab", "b"], [])
@example("abcab", ["abcabc", "bca"], [3])
def test_pieces_give_what_the_whole_gives(text: str, stops: list[str], sizes: list[int]) -> None:
    finder = StopStrings(stops)
    shown = ""
    fed = ""
    for piece in pieces_of(text, sizes):
        shown += finder.feed(piece)
        fed += piece
        if finder.matched is not None:
            break
        # Held back is what can still become a stop string, and not a character more.
        held = fed[len(shown) :]
        longest = max((n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0)
        assert len(held) == longest
    matched = finder.matched
    if matched is None:
        shown += finder.finish()
    assert (shown, matched) == cut(text, stops)


def test_without_stops_all_passes() -> None:
    finder = StopStrings([])
    assert finder.feed("anything") == "anything"
    assert finder.finish() == ""
