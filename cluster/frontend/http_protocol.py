"""What one HTTP connection may cost before, and beside, any request that the application sees."""

import asyncio
from dataclasses import dataclass, field
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from cluster.frontend.connection_share import affordable_connections
from cluster.frontend.http_errors import plain_error

PEER_CERTIFICATE = "remuda.peer_certificate"
"""In a request's scope: the DER certificate that the connection's client has proved to hold."""
_PIECE_BYTES = 16 << 10


@dataclass(frozen=True)
class HttpLimits:
    """Bounds of each connection, and on their number.

    ``max_head_bytes``: request line and headers, and whatever else comes without a byte of body among it.
    ``head_s``: from a request's first byte (or the connection's start) to the end of its headers; for TLS's handshake.
    ``body_window_s``: in each such time a body must bring ``min_body_bytes``, or end.
    ``write_stall_s``: a client that takes nothing of its answer for so long is cut.
    """

    max_head_bytes: int = 64 << 10
    head_s: float = 10.0
    body_window_s: float = 20.0
    min_body_bytes: int = 10_000
    write_stall_s: float = 60.0
    max_connections: int = field(default_factory=lambda: affordable_connections(1 / 2))


def limited_http(bounds: HttpLimits) -> type[HttpToolsProtocol]:
    """The class that uvicorn makes one of for each connection."""

    class Limited(LimitedHttp):
        limits = bounds

    return Limited


class LimitedHttp(HttpToolsProtocol):
    """Counts and times what uvicorn's own protocol takes without bound."""

    limits: ClassVar[HttpLimits]
    _reading: asyncio.TimerHandle | None = None
    """Runs from a request's begin to its last byte, and from the connection's begin."""
    _writing: asyncio.TimerHandle | None = None
    _unsent_bytes: int | None = None
    """When ``_writing`` was armed; None after the client took enough for the next write."""
    _is_in_body = False
    _num_bodiless_bytes = 0
    """Taken since the request began, or since the last byte of its body."""
    _num_piece_bytes = 0
    """Of those that are parsed now."""
    _num_body_bytes = 0
    """Of this window."""
    _peer_certificate: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        if (connection := transport.get_extra_info("ssl_object")) is not None:
            self._peer_certificate = connection.getpeercert(binary_form=True)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "too many connections are open; try again shortly", "too_many_connections")
        else:
            self._expect_within(self.limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        if self._writing is not None:
            self._writing.cancel()
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._reading is None:
            self._expect_within(self.limits.head_s)
        # In pieces, so that the bound holds however much has come at once.
        for start in range(0, len(data), _PIECE_BYTES):
            if self.transport.is_closing():
                return
            piece = data[start : start + _PIECE_BYTES]
            self._num_piece_bytes = len(piece)
            self._num_bodiless_bytes += len(piece)
            super().data_received(piece)
            if self._num_bodiless_bytes > self.limits.max_head_bytes:
                most = self.limits.max_head_bytes
                self._refuse(431, f"request line and headers may have {most} bytes together", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._peer_certificate is not None:
            self.scope[PEER_CERTIFICATE] = self._peer_certificate  # type: ignore[literal-required]
        self._num_bodiless_bytes = self._num_piece_bytes
        if self._reading is None:
            self._expect_within(self.limits.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a body in chunks is not looked at.
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_body = True
        self._expect_within(self.limits.body_window_s)

    def on_body(self, body: bytes) -> None:
        self._num_bodiless_bytes = 0
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_body = False
        self._expect_nothing()

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._num_body_bytes = 0
        self._reading = self.loop.call_later(seconds, self._on_late, seconds)

    def _expect_nothing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _on_late(self, seconds: float) -> None:
        cycle = self._latest_cycle()
        is_answering = cycle is not None and not cycle.response_complete
        # We do not read now; or the next request is early, and this one's answer must not suffer for it.
        is_our_doing = self.flow.read_paused or (is_answering and not self._is_in_body)
        is_body_moving = self._is_in_body and is_answering and self._num_body_bytes >= self.limits.min_body_bytes
        if is_our_doing or is_body_moving:
            self._expect_within(seconds)
        elif not self._is_in_body and not self._num_bodiless_bytes:
            self.transport.close()
        else:
            self._refuse(408, "the request came too slowly", "request_timeout")

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP. uvicorn would answer in plain text, and in the middle of an answer that has begun."""
        self._refuse(400, "what came is not a request of HTTP/1.1", "invalid_request")

    def _latest_cycle(self) -> RequestResponseCycle | None:
        """The last request whose headers are complete, and its answer. uvicorn does not say that it may be None."""
        return self.cycle

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answers where no other answer is on its way, and closes the connection."""
        cycle = self._latest_cycle()
        is_free = cycle is None or (not cycle.response_started if self._is_in_body else cycle.response_complete)
        if is_free:
            body = bytes(plain_error(status, message, code).body)
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
        self._watch_writes()

    # Writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent_bytes = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_writes()

    def _watch_writes(self) -> None:
        """From now on until all is sent."""
        unsent = self.transport.get_write_buffer_size()
        if self._writing is None and unsent:
            self._unsent_bytes = unsent
            self._writing = self.loop.call_later(self.limits.write_stall_s, self._on_stalled)

    def _on_stalled(self) -> None:
        self._writing = None
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent_bytes is not None and unsent >= self._unsent_bytes:
            self.transport.abort()
        else:
            self._watch_writes()
