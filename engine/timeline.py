"""When what happened to one request in its engine. A clock is asked a handful of times per request, never per token."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

MAX_EVENTS = 16
"""A request that is preempted again and again is not to grow."""


class Moment(NamedTuple):
    """``at_s``: monotonic. ``num_steps`` had been answered by then, over which each rank had computed for so many µs:
    the difference of two moments says what the ranks did in between."""

    at_s: float
    num_steps: int = 0
    rank_busy_us: tuple[int, ...] = ()


Clock = Callable[[], Moment]
_NEVER = Moment(0.0)


def no_clock() -> Moment:
    """For an engine of which nobody asks how long anything took."""
    return _NEVER


class Waits(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How long a request waited for its first step, and from there for its first token."""

    queue_s: float
    prefill_s: float


class Timeline:
    """From ``Engine.add`` to the request's end, over preemptions and epochs.

    Args:
        clock: of the engine.
        trace: W3C ``traceparent`` of whoever asked for the request; empty where nobody traces it.
    """

    __slots__ = ("_clock", "answered", "arrived", "begun", "ended", "events", "trace")

    def __init__(self, clock: Clock, trace: str = "") -> None:
        self._clock = clock
        self.trace = trace
        self.arrived = clock()
        self.begun: Moment | None = None
        """Its first step left."""
        self.answered: Moment | None = None
        """Its first token came, of those that this engine gave it."""
        self.ended: Moment | None = None
        self.events: list[tuple[float, str]] = []
        """(When, what) came between: preemptions, and gangs that formed anew."""

    def begin(self) -> None:
        """A step computes some of its prompt. Only the first counts."""
        if self.begun is None:
            self.begun = self._clock()

    def answer(self) -> Waits | None:
        """All of its prompt is computed. None where that is not the first time."""
        if self.answered is not None or self.begun is None:
            return None
        self.answered = self._clock()
        return Waits(self.begun.at_s - self.arrived.at_s, self.answered.at_s - self.begun.at_s)

    def note(self, event: str) -> None:
        """Something that makes it wait again."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((self._clock().at_s, event))

    def end(self) -> "Timeline":
        """However it ended."""
        self.ended = self._clock()
        return self
