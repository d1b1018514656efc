"""One response that streams a request's events, and stops its work when the client goes away: as server-sent events, or
however else an API frames its stream.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import Cancelled
from cluster.frontend.calls import Event, Started
from cluster.frontend.cursor import Cursor, Remainder, parts_of
from cluster.frontend.http_body import disconnected
from cluster.frontend.http_errors import error_object, log_defect
from cluster.frontend.live_request import overdue
from engine.errors import RemudaError

encode_json = msgspec.json.Encoder().encode


class Chunks(Protocol):
    """One API's form of a stream."""

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that show this event, often one, sometimes none."""
        ...


class Framing(Protocol):
    """How one API puts chunks on the wire. ``done`` ends every stream; ``ping`` keeps an idle one busy, empty: nothing
    does."""

    media_type: str
    done: bytes
    ping: bytes

    def chunk(self, chunk: dict[str, Any], event_id: str | None) -> bytes:
        """One chunk. ``event_id``: from where a client can go on, where it can."""
        ...

    def error(self, error: BaseException) -> bytes:
        """The request failed after its stream had begun."""
        ...


class OpenAiFraming:
    """Server-sent events without names, and a last one that says ``[DONE]``, unless ``says_done`` is false."""

    media_type = "text/event-stream"
    ping = b": ping\n\n"

    def __init__(self, says_done: bool = True) -> None:
        self.done = b"data: [DONE]\n\n" if says_done else b""

    def chunk(self, chunk: dict[str, Any], event_id: str | None) -> bytes:
        head = f"id: {event_id}\n".encode() if event_id is not None else b""
        return head + b"data: " + encode_json(chunk) + b"\n\n"

    def error(self, error: BaseException) -> bytes:
        return self.chunk({"error": error_object(error)}, None)


class EventStream(Response):
    """The status waits for the first event after Started, so that a request that fails at once gets its own status;
    but no longer than one ping interval. Later errors come as an error event.

    Args:
        events: the request's.
        failed: set when the request has failed; a client that does not read is cut a grace time later.
        form: how they look.
        framing: how that is put on the wire.
        cursor: where the client is; each event then has an id, from which it can go on over another connection.
        resumes: the client had what is before the cursor; ``events`` begin at the beginning.
        ping_interval_s: after so long without anything to say, a comment keeps the connection busy.
        has_begun: the request was found good long ago; the status does not wait.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        failed: asyncio.Event,
        form: Chunks,
        framing: Framing,
        ping_interval_s: float,
        cursor: Cursor | None = None,
        resumes: bool = False,
        has_begun: bool = False,
    ) -> None:
        super().__init__(
            media_type=framing.media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._failed = failed
        self._form = form
        self._framing = framing
        self._cursor = cursor
        self._remainder = Remainder(cursor) if cursor is not None and resumes else None
        self._ping_interval_s = ping_interval_s
        self._has_begun = has_begun
        self._is_open = False
        self._unsent: list[bytes] = []
        self._last_sent_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises the request's error where nothing has been sent yet, and Cancelled where the client went first or
        does not read.
        """
        writer = asyncio.create_task(self._write_all(send))
        gone, late = asyncio.create_task(disconnected(receive)), asyncio.create_task(overdue(self._failed))
        tasks = {writer, gone, late}
        if self._framing.ping:
            tasks.add(asyncio.create_task(self._ping(send)))
        try:
            await asyncio.wait({writer, gone, late}, return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                raise Cancelled("the client went away" if gone.done() else "the client does not read its answer")
            writer.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_all(self, send: Send) -> None:
        try:
            if self._has_begun:
                await self._send_unsent(send)
            async with aclosing(self._events) as events:
                async for event in events:
                    if self._cursor is not None:
                        self._add_with_ids(event, self._cursor)
                    else:
                        for chunk in self._form.chunks(event):
                            self._unsent.append(self._framing.chunk(chunk, None))
                    if self._unsent and not isinstance(event, Started):
                        await self._send_unsent(send)
        except Exception as error:
            if not self._is_open:
                raise
            if not isinstance(error, RemudaError):
                log_defect(error)
            self._unsent.append(self._framing.error(error))
        self._unsent.append(self._framing.done)
        await self._send_unsent(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _add_with_ids(self, event: Event, cursor: Cursor) -> None:
        for part in parts_of(event):
            rest = part if self._remainder is None else self._remainder.of(part)
            if rest is None:
                # What the client had: the form must have seen it to go on.
                for _ in self._form.chunks(part):
                    pass
                continue
            cursor.note(rest)
            event_id = cursor.event_id()
            for chunk in self._form.chunks(rest):
                self._unsent.append(self._framing.chunk(chunk, event_id))

    async def _send_unsent(self, send: Send) -> None:
        body = b"".join(self._unsent)
        self._unsent.clear()
        self._last_sent_s = asyncio.get_running_loop().time()
        if not self._is_open:
            self._is_open = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_sent_s = loop.time()
        while True:
            await asyncio.sleep(self._last_sent_s + self._ping_interval_s - loop.time())
            if loop.time() >= self._last_sent_s + self._ping_interval_s:
                self._unsent.append(self._framing.ping)
                await self._send_unsent(send)
