"""First come, first served, by priority."""

from engine.request import Request, SamplingParams
from engine.scheduler.policy import PLACES_PER_PRIORITY, in_order, victim_of
from engine.scheduler.request_state import RequestState


def state(arrival: int, priority: int = 0) -> RequestState:
    request = Request(f"r{arrival}", [1], 1, SamplingParams(1), priority)
    return RequestState.of(request, arrival, dp_group=0)


def test_order_is_by_priority_then_arrival() -> None:
    states = [state(3), state(0, priority=1), state(2), state(1, priority=-1)]
    assert [s.arrival for s in in_order(states)] == [1, 2, 3, 0]


def test_a_request_is_overtaken_by_a_bounded_number_of_later_ones() -> None:
    waits = state(0, priority=2)
    others = [state(arrival) for arrival in range(1, 4000)]
    served = in_order([waits, *others])
    assert served.index(waits) == 2 * PLACES_PER_PRIORITY - 1
    assert [other.arrival for other in served if other is not waits] == list(range(1, 4000))


def test_the_victim_is_the_last_in_order() -> None:
    states = [state(1, priority=1), state(4), state(0, priority=1), state(9, priority=-1)]
    assert victim_of(states) is states[0]
    assert victim_of(states[1:2]) is states[1]
