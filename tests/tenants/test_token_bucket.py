"""Buckets: never more than allowed in any window, refunds never more than was reserved."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tenants.token_bucket import TokenBucket

actions = st.lists(
    st.tuples(
        st.floats(0.0, 90.0),  # seconds since the last
        st.integers(1, 130),  # reserved
        st.floats(0.0, 1.0),  # the part of it that is used
    ),
    min_size=1,
    max_size=60,
)


@given(per_minute=st.integers(1, 120), actions=actions)
def test_no_window_lets_more_through_than_the_bucket_and_what_flows_in(
    per_minute: int, actions: list[tuple[float, int, float]]
) -> None:
    bucket, now_s = TokenBucket(per_minute, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for wait_s, amount, _ in actions:
        now_s += wait_s
        needed_s = bucket.take(amount, now_s)
        if needed_s == 0.0:
            taken.append((now_s, amount))
        elif amount <= per_minute:
            again = TokenBucket(per_minute, 0.0)
            again._level, again._at_s = bucket._level, bucket._at_s
            assert again.take(amount, now_s + needed_s * (1 + 1e-9) + 1e-9) == 0.0, "as long as it was told to wait"
    for first, last in itertools.combinations_with_replacement(range(len(taken)), 2):
        window_s = taken[last][0] - taken[first][0]
        assert sum(amount for _, amount in taken[first : last + 1]) <= per_minute * (1 + window_s / 60) + 1e-6


@given(per_minute=st.integers(10, 120), actions=actions)
def test_what_is_refunded_can_be_used_once(per_minute: int, actions: list[tuple[float, int, float]]) -> None:
    """With refunds at once, what was used in any window keeps to the bound of what may be taken."""
    bucket, now_s = TokenBucket(per_minute, 0.0), 0.0
    used: list[tuple[float, int]] = []
    for wait_s, amount, part in actions:
        now_s += wait_s
        if bucket.take(amount, now_s) == 0.0:
            num_used = int(amount * part)
            bucket.give(amount - num_used, now_s)
            used.append((now_s, num_used))
            assert bucket.level(now_s) <= per_minute
    for first, last in itertools.combinations_with_replacement(range(len(used)), 2):
        window_s = used[last][0] - used[first][0]
        assert sum(amount for _, amount in used[first : last + 1]) <= per_minute * (1 + window_s / 60) + 1e-6


def test_what_was_not_reserved_is_a_debt() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.take(60, 0.0) == 0.0
    bucket.give(-30, 0.0)
    assert bucket.level(0.0) == -30
    assert bucket.take(1, 0.0) == 31.0
    assert bucket.take(1, 31.0) == 0.0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.level(40.0) == 0.0
    assert bucket.level(101.0) == 1.0


@settings(max_examples=30)
@given(before=st.integers(1, 100), after=st.integers(1, 100), taken=st.integers(0, 100))
def test_another_bound_keeps_what_was_taken(before: int, after: int, taken: int) -> None:
    bucket = TokenBucket(before, 0.0)
    taken = min(taken, before)
    bucket.take(taken, 0.0)
    bucket.resize(after, 0.0)
    assert bucket.level(0.0) == after - taken
