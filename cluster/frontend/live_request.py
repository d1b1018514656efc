"""One admitted request: its choices' streams are read side by side, until all ended, one failed, or time is up."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from cluster.errors import DeadlineExceeded, Draining, TakenOver, Unavailable
from cluster.frontend.calls import Delta, Echo, Event, Finished, TimeLimits
from cluster.frontend.choice import Choice
from cluster.frontend.clock import Clock, Timer
from cluster.frontend.metrics import Metrics
from cluster.replica.keep import Keep
from engine.errors import EngineFailure, RemudaError
from engine.request import FinishReason, Output, Request

OpenStream = Callable[[Request], AsyncGenerator[Output, None]]

_log = logging.getLogger(__name__)

MAX_UNREAD_TOKENS = 4096
"""Of one choice, that its reader has not taken."""
READER_GRACE_S = 3.0
"""So long the reader of a request that has failed may take over what it was given before, and over the error."""


async def overdue(failed: asyncio.Event) -> None:
    """Returns when a request's reader is to be left alone with what it has."""
    await failed.wait()
    await asyncio.sleep(READER_GRACE_S)


class LiveRequest:
    """Args:
    requests: one per choice.
    choices: in the same order.
    open_stream: a request's outputs; closing them ends its work.
    keeps: where the client may come back: one per choice, noted when nothing more is wanted of it.
    limits: counted from ``arrived_s``.
    clock: for them and for the latencies.
    arrived_s: when the client's request came.
    metrics: gets the latencies.
    failed: set as soon as the request has failed, also while its reader is still busy with an earlier event.
    num_at_once: so many of the requests run at a time, the others after them; None: all.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        open_stream: OpenStream,
        limits: TimeLimits,
        clock: Clock,
        arrived_s: float,
        metrics: Metrics,
        failed: asyncio.Event | None = None,
        keeps: Sequence[Keep] = (),
        num_at_once: int | None = None,
    ) -> None:
        self._requests = requests
        self._choices = choices
        self._open_stream = open_stream
        self._keeps = keeps
        self._turns = asyncio.Semaphore(num_at_once or len(requests))
        self._limits = limits
        self._clock = clock
        self._arrived_s = arrived_s
        self._metrics = metrics
        self._failed = failed or asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._read = asyncio.Event()
        """Set when the reader has taken what there was."""
        self._changed: dict[int, Choice] = {}
        self._error: BaseException | None = None
        self._has_begun = False
        self._timers: dict[str, Timer] = {}

    @property
    def adapter(self) -> str:
        """That it asks for; empty: the base model."""
        return self._requests[0].adapter

    @property
    def has_begun(self) -> bool:
        """Some choice has come out of the queue."""
        return self._has_begun

    @property
    def call_id(self) -> str:
        return self._requests[0].request_id.rpartition(".")[0]

    async def events(self) -> AsyncGenerator[Event, None]:
        """Echo, Delta and Finished of all choices, as they come; what arrived together is one Delta.

        Leaving it, at the end or before, stops all work of this request.

        Raises:
            DeadlineExceeded: a limit has passed.
            RemudaError: a choice failed; the others are stopped.
        """
        self._arm("total", self._limits.total_s, "was not finished within")
        self._arm("queue", self._limits.queue_s, "did not begin to run within")
        self._arm("first token", self._limits.first_token_s, "had no token within")
        self._pumps = [
            asyncio.create_task(self._pump(request, choice))
            for request, choice in zip(self._requests, self._choices, strict=True)
        ]
        num_open = len(self._pumps)
        try:
            while num_open:
                await self._wake.wait()
                self._wake.clear()
                changed, self._changed = self._changed, {}
                # All of it before the first yield: while the reader is busy, the choices go on.
                news = [event for choice in changed.values() for event in _news(choice)]
                error = self._error
                self._read.set()
                for event in news:
                    yield event
                    num_open -= isinstance(event, Finished)
                # An error that comes after every choice's end is nobody's: a request ends once.
                if error is not None and num_open:
                    raise error
        finally:
            self._stop_work()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    def _arm(self, name: str, limit_s: float | None, what: str) -> None:
        if limit_s is not None:
            message = f"the request {what} {limit_s:g} s ({name} deadline)"
            self._timers[name] = self._clock.call_at(
                self._arrived_s + limit_s, lambda: self.fail(DeadlineExceeded(message))
            )

    def _disarm(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def fail(self, error: BaseException) -> None:
        """The first error is the request's. Its work stops here and now: who reads the events may be stuck."""
        if self._error is None:
            self._error = error
        # What somebody else can go on with, or does already, is not to end with its reader here.
        if not isinstance(error, Draining | TakenOver):
            for keep in self._keeps:
                keep.is_wanted = False
        self._stop_work()
        self._failed.set()
        self._wake.set()

    def _stop_work(self) -> None:
        """The one place where a request's work ends: no timer fires any more, every choice's stream is closed."""
        for timer in self._timers.values():
            timer.cancel()
        for pump in self._pumps:
            pump.cancel()

    async def _pump(self, request: Request, choice: Choice) -> None:
        try:
            async with self._turns, aclosing(self._open_stream(request)) as outputs:
                async for output in outputs:
                    self._take(output, choice)
                    if choice.finished is not None:
                        if self._keeps:
                            self._keeps[self._choices.index(choice)].is_wanted = False
                        return
                    if choice.num_unread > MAX_UNREAD_TOKENS:
                        await self._until_read()
            raise EngineFailure("the replica's stream ended before the request did")
        except RemudaError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001  a defect of ours: the client gets an answer, the log the rest
            _log.exception("request %s failed in our own code", request.request_id)
            self.fail(error)

    async def _until_read(self) -> None:
        """The reader is slow: what comes meanwhile waits at the leader, where it takes the least memory."""
        self._read.clear()
        await self._read.wait()

    def _take(self, output: Output, choice: Choice) -> None:
        self._has_begun = True
        self._disarm("queue")
        if output.finish_reason is FinishReason.ERROR:
            raise EngineFailure(output.error or "the engine could not go on with this request")
        if output.finish_reason is FinishReason.ABORT:
            raise Unavailable("the replica stopped this request; try again")
        now_s = self._clock.now_s()
        if output.waits is not None and choice.waits is None:
            choice.waits = output.waits
            self._metrics.begun(output.waits)
        if output.pooled is not None:
            self._disarm("first token")
        if output.token_ids:
            self._disarm("first token")
            self._metrics.generated(len(output.token_ids))
            if choice.last_token_s is None:
                choice.first_token_s = now_s
                self._metrics.first_token(now_s - self._arrived_s)
            else:
                self._metrics.next_tokens(now_s - choice.last_token_s, len(output.token_ids))
            choice.last_token_s = now_s
        choice.feed(output)
        if choice.finished is not None and choice.first_token_s is not None:
            self._metrics.decoded(now_s - choice.first_token_s, choice.waits)
        self._changed[choice.index] = choice
        self._wake.set()


def _news(choice: Choice) -> list[Echo | Delta | Finished]:
    """All that is new, taken at one moment: while its reader is busy with the first, more may come."""
    news: list[Echo | Delta | Finished | None] = [choice.take_echo(), choice.take_delta(), choice.finished]
    return [event for event in news if event is not None]
