"""Who goes first and who has to yield among the requests of one tenant, and among those that run. Between tenants that
wait: engine.scheduler.fair_queue."""

from collections.abc import Iterable

from engine.scheduler.request_state import RequestState

PLACES_PER_PRIORITY = 1024
"""So many requests that arrive later may go before an older one whose priority number is one higher."""


def place(state: RequestState) -> tuple[int, int]:
    """Lower priority number first; among equals the older.

    Nobody starves: a request counts as if it had arrived PLACES_PER_PRIORITY requests later for each number that its
    priority is higher, so after that many others its turn has come, however many more of a better priority arrive.
    """
    return (state.arrival + PLACES_PER_PRIORITY * state.priority, state.arrival)


def in_order(states: Iterable[RequestState]) -> list[RequestState]:
    """As they are served."""
    return sorted(states, key=place)


def victim_of(running: Iterable[RequestState]) -> RequestState:
    """Which of these (at least one) gives its blocks back, so that others can go on: the last to be served. So the
    first is chosen only when it is alone, and there is always progress."""
    return max(running, key=place)
