"""All stored responses of this front end, and those that it takes over from the leaders."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from cluster.errors import Cancelled, TakenOver, UnknownStream
from cluster.frontend.calls import Call, Event
from cluster.frontend.clock import Clock
from cluster.frontend.http_body import parse_body
from cluster.frontend.http_errors import log_defect
from cluster.frontend.responses.calls import response_call
from cluster.frontend.responses.items import answer_message, input_items, messages_of
from cluster.frontend.responses.live import LiveResponse
from cluster.frontend.responses.schema import CreateBody
from cluster.frontend.responses.store import ResponseStore, StoredResponse, unknown
from cluster.frontend.service import Service
from cluster.frontend.stored_call import FoundCall, StoredCall
from cluster.frontend.whole_answer import put_together
from cluster.identity.principal import current_principal
from engine.errors import InvalidRequest

KIND = "response"


class _Kept(msgspec.Struct, frozen=True):
    """What leaders keep of a response's request, so that any front end can go on with it. ``before``: the messages of
    the conversation before it."""

    body: bytes
    before: list[dict[str, Any]]


class Responses:
    """Args:
    service: the path of every request.
    clock: for grace times and the store's.
    store: bounds what is kept.
    """

    def __init__(self, service: Service, clock: Clock, store: ResponseStore | None = None) -> None:
        self._service = service
        self._clock = clock
        self._store = store or ResponseStore()
        self._live: dict[str, LiveResponse] = {}

    async def prepare(
        self, raw: bytes, response_id: str, created_unix_s: int
    ) -> tuple[StoredResponse, Call, StoredCall]:
        """A new request, the call that it makes, and what leaders are to keep of it.

        Raises:
            InvalidRequest: see ``response_call``; or the previous response is not finished.
            UnknownStream: there is no such previous response.
        """
        body = parse_body(CreateBody, raw)
        before = [] if body.previous_response_id is None else await self._conversation(body.previous_response_id)
        kept = _Kept(raw, before)
        encoded = msgspec.msgpack.encode(kept)
        stored = _stored(response_id, kept, body, created_unix_s, len(encoded))
        call = response_call(body, stored.messages, response_id)
        return stored, call, StoredCall(KIND, response_id, encoded, created_unix_s)

    def begin(self, stored: StoredResponse, call: Call, kept: StoredCall) -> LiveResponse:
        """Have it computed."""
        failed = asyncio.Event()
        return self._begin(stored, self._service.generate(call, failed, kept), failed)

    def _begin(
        self,
        stored: StoredResponse,
        events: AsyncGenerator[Event, None],
        failed: asyncio.Event,
        found: FoundCall | None = None,
    ) -> LiveResponse:
        response_id = stored.response_id

        def stop(error: Cancelled) -> bool:
            has_begun = self._service.end(response_id, error)
            if found is not None and not has_begun:
                self._service.backend.abandon(found)
            return has_begun

        def ended() -> None:
            del self._live[response_id]
            if stored.error is not None:
                log_defect(stored.error)
            is_cancelled = found is not None and isinstance(stored.error, Cancelled)
            is_elsewhere = isinstance(stored.error, TakenOver)
            if (stored.events or is_cancelled) and not is_elsewhere:
                self._store.end(stored, self._clock.now_s())
            else:
                # Refused before it began: its client has the reason. Or another front end reads it: who asks here
                # gets it from the leaders again.
                self._store.forget(response_id, self._clock.now_s())

        self._store.begin(stored)
        live = self._live[response_id] = LiveResponse(stored, events, failed, self._clock, stop, ended)
        return live

    async def find(self, response_id: str) -> StoredResponse:
        """One that this tenant may see; also one that another front end began and that leaders still have.

        Raises UnknownStream.
        """
        if not self._store.knows(response_id):
            await self._take_over(response_id)
        return self._store.get(response_id, current_principal().tenant, self._clock.now_s())

    async def _take_over(self, response_id: str) -> None:
        found = await self._service.find(response_id)
        if found.stored.kind != KIND:
            raise unknown(response_id)
        try:
            kept = msgspec.msgpack.decode(found.stored.body, type=_Kept)
        except msgspec.MsgspecError as error:
            raise UnknownStream(f"another version of the server keeps this response: {error}") from error
        if not self._store.knows(response_id):
            size = len(found.stored.body)
            body = parse_body(CreateBody, kept.body)
            stored = _stored(response_id, kept, body, int(found.stored.created_unix_s), size)
            call = response_call(stored.body, stored.messages, response_id)
            failed = asyncio.Event()
            self._begin(stored, self._service.resume(call, found, failed), failed, found)

    def follow(self, stored: StoredResponse) -> tuple[AsyncGenerator[Event, None], asyncio.Event]:
        """Its events from the first on, as they come, and what is set when it has failed. The events raise its error
        at its place."""
        live = self._live.get(stored.response_id)
        return (_told(stored), asyncio.Event()) if live is None else (live.follow(), live.failed)

    async def cancel(self, response_id: str) -> StoredResponse:
        """Stop its work, and wait until it has. One that is over stays as it is. Raises UnknownStream."""
        while True:
            stored = await self.find(response_id)
            live = self._live.get(response_id)
            if live is None:
                return stored
            live.cancel("the response was cancelled")
            await live.over.wait()
            if not isinstance(stored.error, TakenOver):
                return stored

    async def delete(self, response_id: str) -> None:
        """Raises UnknownStream."""
        await self.cancel(response_id)
        self._store.remove(response_id, self._clock.now_s())

    async def _conversation(self, response_id: str) -> list[dict[str, Any]]:
        stored = await self.find(response_id)
        if not stored.is_over or stored.error is not None:
            raise InvalidRequest(f"the response {response_id!r} is not complete", "previous_response_id")
        return [*stored.messages, answer_message(put_together(stored.events), response_id)]


async def _told(stored: StoredResponse) -> AsyncGenerator[Event, None]:
    for event in stored.events:
        yield event
    if stored.error is not None:
        raise stored.error


def _stored(response_id: str, kept: _Kept, body: CreateBody, created_unix_s: int, size: int) -> StoredResponse:
    items = input_items(body.input)
    messages = [*kept.before, *messages_of(items)]
    return StoredResponse(response_id, current_principal().tenant, body, items, messages, created_unix_s, size)
