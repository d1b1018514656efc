"""Scaling: the number of replicas follows the leaders' queues, within bounds, and not every gust."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.control.autoscaling import ReplicaLoad, ScalingBounds, ScalingState, decide, wanted_replicas

BOUNDS = ScalingBounds(min_replicas=2, max_replicas=4, target=0.8, up_after_s=2.0, down_after_s=60.0)
IDLE = ReplicaLoad(0, 0, 10)


def busy(num_requests: int, num_replicas: int = 2) -> list[ReplicaLoad]:
    """All requests on the first replica: 10 run, the rest waits."""
    first = ReplicaLoad(min(num_requests, 10), max(0, num_requests - 10), 10)
    return [first] + [IDLE] * (num_replicas - 1)


class Scaler:
    """Decides again and again, as the controller does."""

    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._state = ScalingState()

    def at(self, now_s: float, loads: list[ReplicaLoad]) -> int:
        self.num_replicas, self._state = decide(self.num_replicas, loads, BOUNDS, self._state, now_s)
        return self.num_replicas


def test_what_is_wanted() -> None:
    assert wanted_replicas([], BOUNDS) == 2, "nobody has told a load yet"
    assert wanted_replicas([IDLE, IDLE], BOUNDS) == 2
    assert wanted_replicas(busy(16), BOUNDS) == 2
    assert wanted_replicas(busy(17), BOUNDS) == 3
    assert wanted_replicas(busy(500), BOUNDS) == 4


def test_a_load_that_lasts_adds_replicas_at_once() -> None:
    scaler = Scaler(2)
    assert scaler.at(0.0, busy(30)) == 2
    assert scaler.at(1.9, busy(30)) == 2
    assert scaler.at(2.0, busy(30)) == 4
    assert scaler.at(10.0, busy(30)) == 4


def test_a_gust_does_not() -> None:
    scaler = Scaler(2)
    assert scaler.at(0.0, busy(30)) == 2
    assert scaler.at(1.0, busy(3)) == 2
    assert scaler.at(2.5, busy(30)) == 2
    assert scaler.at(4.4, busy(30)) == 2


def test_it_shrinks_one_by_one_after_a_longer_while() -> None:
    scaler = Scaler(4)
    assert scaler.at(0.0, busy(1)) == 4
    assert scaler.at(59.0, busy(1)) == 4
    assert scaler.at(60.0, busy(1)) == 3
    assert scaler.at(61.0, busy(1)) == 3
    assert scaler.at(121.0, busy(1)) == 2
    assert scaler.at(500.0, busy(1)) == 2


def test_a_number_outside_the_bounds_is_mended_at_once() -> None:
    assert Scaler(1).at(0.0, busy(1)) == 2
    assert Scaler(9).at(0.0, busy(1)) == 4


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.floats(0.0, 50.0), st.integers(0, 100)), min_size=1, max_size=30),
)
def test_the_number_is_always_within_the_bounds(start: int, moments: list[tuple[float, int]]) -> None:
    scaler, now_s = Scaler(start), 0.0
    for seconds, num_requests in moments:
        now_s += seconds
        before = scaler.num_replicas
        after = scaler.at(now_s, busy(num_requests))
        assert BOUNDS.min_replicas <= after <= BOUNDS.max_replicas
        assert after >= before - 1 or before > BOUNDS.max_replicas
