"""Waiting for a host, on a clock of the test's."""

from cluster.replica.host_wait import STAY_INTERVAL_S, HostWait


def test_nobody_waits_where_no_time_is_given() -> None:
    assert not HostWait(0.0).goes_on(False, 5.0)


def test_it_ends_with_room_and_with_the_time() -> None:
    wait = HostWait(60.0)
    assert wait.goes_on(False, 100.0) and wait.goes_on(False, 159.0)
    assert not wait.goes_on(False, 160.0)
    assert not wait.goes_on(True, 120.0)
    assert wait.goes_on(False, 200.0), "the next one has all its time"


def test_the_others_are_told_at_once_and_then_now_and_then() -> None:
    wait = HostWait(600.0)
    wait.goes_on(False, 1000.0)
    told = [second for second in range(1000, 1100) if wait.is_time_to_tell(float(second))]
    assert told == [1000 + n * int(STAY_INTERVAL_S) for n in range(5)]
