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


def _rank(state: RequestState) -> tuple[int, int]:
    return (state.priority, state.arrival)


class FirstComeFirstServed:
    """Lower priority number first; among equals the older. The last to be served is the first to yield."""

    def order(self, waiting: Iterable[RequestState]) -> list[RequestState]:
        return sorted(waiting, key=_rank)

    def victim(self, running: Sequence[RequestState]) -> RequestState:
        return max(running, key=_rank)
