"""How every HTTP API has its requests carried out: a body is read, a call goes through the service, its events come
back whole or as a stream in the API's own form.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cluster.frontend.calls import Call, Event
from cluster.frontend.cursor import Cursor
from cluster.frontend.http_body import read_body, while_connected
from cluster.frontend.service import Service
from cluster.frontend.sse import Chunks, EventStream, Framing
from cluster.frontend.stored_call import FoundCall, StoredCall


@dataclass(frozen=True)
class HttpSettings:
    """``max_body_bytes`` bounds each request's body; ``ping_interval_s`` each stream's silence."""

    max_body_bytes: int = 16 * 2**20
    ping_interval_s: float = 10.0


class Answers:
    """Args:
    service: the path of every request.
    settings: of all HTTP APIs.
    """

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self.service = service
        self._settings = settings

    async def body(self, request: Request) -> bytes:
        """Raises PayloadTooLarge, Cancelled."""
        return await read_body(request, self._settings.max_body_bytes)

    async def whole(self, request: Request, call: Call, note: Callable[[Event], None] | None = None) -> list[Event]:
        """All events of a call; ``note`` gets each when it comes.

        Raises its error, and Cancelled where the client goes first.
        """
        events = self.service.generate(call)

        async def collect() -> list[Event]:
            collected: list[Event] = []
            async for event in events:
                if note is not None:
                    note(event)
                collected.append(event)
            return collected

        return await while_connected(request.receive, collect())

    def stream(self, call: Call, form: Chunks, framing: Framing, stored: StoredCall | None = None) -> Response:
        """A call's events as they come. With ``stored`` the client may come back for what it missed."""
        failed = asyncio.Event()
        events = self.service.generate(call, failed, stored)
        cursor = None if stored is None else Cursor(call.request_id)
        return EventStream(events, failed, form, framing, self._settings.ping_interval_s, cursor)

    def resumed(self, call: Call, found: FoundCall, form: Chunks, framing: Framing, had: Cursor) -> Response:
        """What follows of a call whose client came back."""
        failed = asyncio.Event()
        events = self.service.resume(call, found, failed)
        return EventStream(events, failed, form, framing, self._settings.ping_interval_s, had, resumes=True)

    def shown(
        self,
        events: AsyncGenerator[Event, None],
        failed: asyncio.Event,
        form: Chunks,
        framing: Framing,
        has_begun: bool = False,
    ) -> Response:
        """Events of a request that runs by itself. ``has_begun``: another client was told so before."""
        return EventStream(events, failed, form, framing, self._settings.ping_interval_s, has_begun=has_begun)
