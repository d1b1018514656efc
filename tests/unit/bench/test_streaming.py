"""What is made of the messages of streams whose every arrival is known."""

import pytest

from bench.streaming import all_running, delay_p99_ms
from bench.streaming_paths import Received, _num_tokens


def test_a_message_delays_each_of_its_tokens() -> None:
    """Steps are 10 ms apart; the third and fourth token come with the fifth."""
    received = Received([1.000, 1.010, 1.040], [1, 2, 5])
    assert received.delays_s(0.010) == pytest.approx([0, 0, 0.020, 0.010, 0])
    assert received.delays_s(0.010, 1.005, 1.015) == pytest.approx([0])


def test_a_path_that_falls_behind_is_ever_later() -> None:
    received = Received([0.02 * step for step in range(101)], list(range(1, 102)))
    assert delay_p99_ms([received], 0.010) == pytest.approx(990)
    assert delay_p99_ms([received], 0.020) == pytest.approx(0)


def test_the_beginning_is_not_in_what_comes_while_all_run() -> None:
    first = Received([1.00, 1.05, 1.06, 1.07], [1, 6, 7, 8])
    last = Received([1.05, 1.06, 1.07], [1, 2, 3])
    window = all_running([first, last])
    assert window == (1.05, 1.07)
    early = Received([1.00, 1.04, 1.05, 1.06, 1.07], [1, 5, 6, 7, 8])
    assert delay_p99_ms([early, last], 0.010, *window) == pytest.approx(0)
    assert delay_p99_ms([early, last], 0.010) > 20
    # Streams that were too short to run at once: all of their tokens.
    assert delay_p99_ms([early], 0.010, 2.0, 1.0) == delay_p99_ms([early], 0.010)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (b'data: {"choices":[{"text":"a b","token_ids":[300,301]}]}', 2),
        (b'data: {"choices":[{"text":"","finish_reason":"length"}]}', 0),
        (b'data: {"choices":[],"usage":{"completion_tokens":7}}', 0),
    ],
)
def test_tokens_of_an_event_are_counted(line: bytes, count: int) -> None:
    assert _num_tokens(line) == count
