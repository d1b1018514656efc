"""Which rank is held to be lost while a gang starts."""

import msgspec

from engine.executor.start_watch import SILENT_S, STOPPED_S, StartWatch
from engine.progress import RankSample

RUNNING = [RankSample(0, process_state="R"), RankSample(1, process_state="S")]
STOPPED = [RUNNING[0], RankSample(1, process_state="T")]
TICK_S = 0.5


def first_failure(samples: list[RankSample], seconds: float) -> tuple[float, str] | None:
    """When, after the first look, and of whom."""
    watch, now_s = StartWatch(), 100.0
    while now_s <= 100.0 + seconds:
        if (failure := watch.observe(now_s, samples)) is not None:
            return now_s - 100.0, f"{failure.rank}: {failure}"
        now_s += TICK_S
    return None


def test_ranks_that_load_for_hours_are_let_be() -> None:
    assert first_failure(RUNNING, 7200.0) is None


def test_a_stopped_rank_is_named_in_seconds() -> None:
    found = first_failure(STOPPED, 60.0)
    assert found is not None and found[0] == STOPPED_S
    assert found[1].startswith("1: rank 1 ") and "stopped" in found[1]


def test_a_rank_that_is_continued_in_time_is_let_be() -> None:
    watch = StartWatch()
    for second in range(20):
        assert watch.observe(second * 1.5, STOPPED if second % 2 else RUNNING) is None


def test_time_in_which_nobody_looked_does_not_count() -> None:
    watch = StartWatch()
    assert watch.observe(0.0, RUNNING) is None
    assert watch.observe(3600.0, STOPPED) is None
    assert watch.observe(3600.5, STOPPED) is None


def test_a_host_that_falls_silent_is_given_up_late() -> None:
    silent = [RUNNING[0], msgspec.structs.replace(RUNNING[1], report_age_s=SILENT_S / 2)]
    assert first_failure(silent, 60.0) is None
    found = first_failure([RUNNING[0], msgspec.structs.replace(RUNNING[1], report_age_s=SILENT_S)], 60.0)
    assert found is not None and found[1].startswith("1: ") and "reported nothing" in found[1]
