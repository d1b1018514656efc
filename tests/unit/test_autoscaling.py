"""Scaling: the number of replicas follows the leaders' queues, within bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.autoscaling import ReplicaLoad, wanted_replicas

IDLE = ReplicaLoad(0, 0, 10)


def busy(num_requests: int) -> list[ReplicaLoad]:
    """All requests on the first of two replicas: 10 run, the rest waits."""
    return [ReplicaLoad(min(num_requests, 10), max(0, num_requests - 10), 10), IDLE]


@pytest.mark.parametrize(("num_requests", "expected"), [(0, 2), (16, 2), (17, 3), (24, 3), (25, 4), (500, 4)])
def test_enough_for_the_target_share(num_requests: int, expected: int) -> None:
    assert wanted_replicas(2, busy(num_requests), 2, 4) == expected


def test_fewer_come_one_at_a_time() -> None:
    assert wanted_replicas(4, busy(0), 1, 4) == 3
    assert wanted_replicas(2, busy(0), 1, 4) == 1
    assert wanted_replicas(1, busy(0), 1, 4) == 1


def test_nobody_has_told_a_load_yet() -> None:
    assert wanted_replicas(3, [], 2, 4) == 3
    assert wanted_replicas(9, [], 2, 4) == 4


@given(st.integers(0, 9), st.integers(0, 1000), st.integers(1, 4), st.integers(0, 4))
def test_always_within_the_bounds(num_replicas: int, num_requests: int, least: int, more: int) -> None:
    assert least <= wanted_replicas(num_replicas, busy(num_requests), least, least + more) <= least + more
