"""Who goes first and who has to yield."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.scheduler.request_state import RequestState


class Policy(Protocol):
    def order(self, waiting: Iterable[RequestState]) -> list[RequestState]:
        """The requests in the order in which they are served. Admission stops at the first that does not fit."""
        ...

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        """Which of these running requests (at least one) gives its blocks back, so that others can go on.

        Progress needs that the request that ``order`` puts first is chosen only when it is alone.
        """
        ...


PLACES_PER_PRIORITY = 1024
"""So many requests that arrive later may go before an older one whose priority number is one higher."""


def _place(state: RequestState) -> tuple[int, int]:
    return (state.arrival + PLACES_PER_PRIORITY * state.priority, state.arrival)


class FirstComeFirstServed:
    """Lower priority number first; among equals the older. The last to be served is the first to yield.

    Nobody starves: a request counts as if it had arrived PLACES_PER_PRIORITY requests later for each number that its
    priority is higher, so after that many others its turn has come, however many more of a better priority arrive.
    """

    def order(self, waiting: Iterable[RequestState]) -> list[RequestState]:
        return sorted(waiting, key=_place)

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        return max(running, key=_place)
