"""A stored response while it is computed: by a task of its own, read by any number of connections."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from cluster.errors import Cancelled
from cluster.frontend.calls import Event
from cluster.frontend.clock import Clock, Timer
from cluster.frontend.responses.store import StoredResponse

GRACE_S = 30.0
"""So long a response that is not in the background goes on without a reader, as any resumable request does."""


class LiveResponse:
    """Args:
    stored: takes what comes.
    events: the request's; begins to run at once.
    clock: for the grace time.
    failed: set when the request has failed, before its readers know.
    stop: has the request end with an error; false where it has not begun.
    ended: called once, when it is over.
    """

    def __init__(
        self,
        stored: StoredResponse,
        events: AsyncGenerator[Event, None],
        failed: asyncio.Event,
        clock: Clock,
        stop: Callable[[Cancelled], bool],
        ended: Callable[[], None],
    ) -> None:
        self.stored = stored
        self.failed = failed
        self.over = asyncio.Event()
        """Nothing more comes."""
        self._clock = clock
        self._stop = stop
        self._ended = ended
        self._num_readers = 0
        self._leaving: Timer | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run(events))
        # Not by the task itself: one that is cancelled at once never runs.
        self._task.add_done_callback(self._end)

    def cancel(self, why: str) -> None:
        """Stop the work; its readers get what came, then the error."""
        if not self.stored.is_over and not self._stop(Cancelled(why)):
            self._task.cancel()

    async def follow(self) -> AsyncGenerator[Event, None]:
        """From the first event on. Raises the request's error at its place."""
        self._num_readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            async for event in self._events():
                yield event
        finally:
            self._num_readers -= 1
            if not (self._num_readers or self.stored.is_over or self.stored.body.background):
                why = f"nobody has read this response for {GRACE_S:g} s"
                self._leaving = self._clock.call_at(self._clock.now_s() + GRACE_S, lambda: self.cancel(why))

    async def _events(self) -> AsyncGenerator[Event, None]:
        stored, index = self.stored, 0
        # The end joins events: whoever is in the midst of them goes on in the list that was.
        events = stored.events
        while True:
            news = self._news
            while index < len(events):
                index += 1
                yield events[index - 1]
            if stored.is_over and index == len(events):
                break
            await news.wait()
        if stored.error is not None:
            raise stored.error

    async def _run(self, events: AsyncGenerator[Event, None]) -> None:
        received = self.stored.events
        try:
            async with aclosing(events):
                async for event in events:
                    received.append(event)
                    self._tell()
        except Exception as error:  # noqa: BLE001  whatever it is, the readers get it
            self.stored.error = error

    def _end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.stored.error = Cancelled("the response was stopped")
        self.stored.is_over = True
        if self._leaving is not None:
            self._leaving.cancel()
        self._ended()
        self.over.set()
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
