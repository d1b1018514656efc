"""What bench.recovery promises, on figures of a run that kept everything (docs/performance.md, 6c741c6)."""

from typing import Any

import pytest

from bench.recovery import Stream, report
from bench.recovery_verdict import gap_bound_s, verdicts

SPARE: dict[str, Any] = {
    "spare_ranks": 1,
    "gap_less_prefill_s": 1.4,
    "slowest_rank_s": {"import": 0.0, "rendezvous": 0.2, "load": 0.25, "profile": 0.0, "warm_up": 0.1},
    "survivors_keep_pid": True,
    "survivors_read_bytes": 45_090,
    "throughput_ratio": 1.02,
}
NO_SPARE: dict[str, Any] = SPARE | {
    "spare_ranks": 0,
    "gap_less_prefill_s": 2.26,
    "slowest_rank_s": {"import": 1.03, "rendezvous": 1.6, "load": 0.26, "profile": 0.0, "warm_up": 0.1},
}


def test_tokens_are_counted_and_not_chunks() -> None:
    stream = Stream([1, 2, 3])
    for at_s, token_ids in ((1.0, [7]), (2.0, [8, 9, 10]), (3.0, []), (4.0, [11, 12])):
        stream.note(at_s, token_ids)
    assert (stream.num_between(0.0, 5.0), stream.num_between(2.0, 4.0)) == (6, 3)
    assert stream.token_ids == [7, 8, 9, 10, 11, 12] and stream.gap_s(0.0) == 1.0


@pytest.mark.parametrize("found", [SPARE, NO_SPARE])
def test_a_run_that_kept_everything(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert report(found)
    assert "MISSED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "change", "missed"),
    [
        (SPARE, {"gap_less_prefill_s": 3.01}, "gap less the prefill of the same tokens: 3.01 s, promised ≤ 3.00 s"),
        (NO_SPARE, {"gap_less_prefill_s": 3.87}, "gap less the prefill of the same tokens: 3.87 s, promised ≤ 3.86 s"),
        (SPARE, {"survivors_keep_pid": False}, "survivors keep their processes: no, promised yes"),
        (NO_SPARE, {"survivors_read_bytes": 1_000_000}, "survivors read: 1,000,000 B, promised < 1,000,000 B"),
        (SPARE, {"throughput_ratio": 0.949}, "throughput after ÷ before: 0.949, promised ≥ 0.95"),
    ],
)
def test_each_missed_promise_is_named_and_fails_the_run(
    base: dict[str, Any], change: dict[str, Any], missed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = base | change
    assert [each.was_kept for each in verdicts(found)].count(False) == 1
    assert not report(found)
    assert f"MISSED  {missed}" in capsys.readouterr().out


def test_the_import_counts_once() -> None:
    """Survivors that are asked at once wait for it; a rank that came before them does not."""
    assert gap_bound_s(0, {"import": 1.0, "rendezvous": 1.5, "load": 0.5}) == 4.0
    assert gap_bound_s(0, {"import": 1.0, "rendezvous": 0.1, "load": 0.5}) == 3.5
