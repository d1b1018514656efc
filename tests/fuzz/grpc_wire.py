"""Makes a call, good or bad, on a connection of its own: HTTP/2 by hand, so that everything can be wrong."""

import asyncio
import contextlib
import ssl
import struct
from dataclasses import dataclass, field
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.fuzz.grpc_inputs import GrpcInput
from tests.fuzz.http_wire import ANSWER_S, BadAnswer, connect, hang_up
from tests.fuzz.messages import ENDLESS

_GRACE_S = 0.05
"""For an answer to bytes that are no frames, and for one that has no end."""
_READ_BYTES = 1 << 16


@dataclass
class GrpcAnswer:
    """``http_status`` 0: no head came. ``status``: gRPC's, None where none came. ``is_cut``: the server reset the
    stream or closed the connection."""

    http_status: int = 0
    status: int | None = None
    message: str = ""
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    is_cut: bool = False
    is_ended: bool = False


async def call(host: str, port: int, given: GrpcInput, tls: ssl.SSLContext | None = None) -> GrpcAnswer | None:
    """None where nothing was waited for. ``tls``: None: in clear text. Raises BadAnswer."""
    reader, writer = await connect(host, port, tls)
    try:
        async with asyncio.timeout(ANSWER_S):
            return await _Call(reader, writer).run(given)
    except TimeoutError:
        raise BadAnswer(f"nothing came within {ANSWER_S} s") from None
    finally:
        await hang_up(writer)


class _Call:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="latin-1",
            validate_inbound_headers=False,  # the library repeats a header's bad name
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self._h2 = h2.connection.H2Connection(config)
        self._answer = GrpcAnswer()

    async def run(self, given: GrpcInput) -> GrpcAnswer | None:
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(2**30)
        if given.tears:
            self._writer.write(self._h2.data_to_send() + given.data)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    while await self._reader.read(_READ_BYTES):
                        pass
            return None
        try:
            self._h2.send_headers(1, _headers(given))
            self._h2.increment_flow_control_window(2**30, 1)
            body = given.data if given.is_raw else struct.pack(">BI", 0, len(given.data)) + given.data
            self._send_body(body, ends=not given.leaves)
        except h2.exceptions.ProtocolError as error:
            raise AssertionError(f"the input cannot be sent: {error}") from error
        if given.leaves:
            self._h2.reset_stream(1)
        self._writer.write(self._h2.data_to_send())
        if given.leaves:
            await self._writer.drain()
            return None
        is_endless = given.path.decode("latin-1") in ENDLESS
        try:
            async with asyncio.timeout(_GRACE_S if is_endless else None):
                await self._read()
        except TimeoutError:
            if not is_endless:
                raise
        return self._answer

    def _send_body(self, body: bytes, ends: bool) -> None:
        # One window's worth at most: no input needs more.
        self._h2.send_data(1, body[:16_000], end_stream=ends and len(body) <= 16_000)
        if len(body) > 16_000:
            self._h2.send_data(1, body[16_000:32_000], end_stream=False)
            self._h2.send_data(1, body[32_000:48_000], end_stream=ends)

    async def _read(self) -> None:
        while not self._answer.is_ended:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                self._answer.is_cut = True
                return
            try:
                events = self._h2.receive_data(data)
            except h2.exceptions.ProtocolError as error:
                raise BadAnswer(f"not HTTP/2: {error}") from None
            for event in events:
                self._take(event)
            if waiting := self._h2.data_to_send():
                self._writer.write(waiting)

    def _take(self, event: h2.events.Event) -> None:
        answer = self._answer
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            fields = {str(name): str(value) for name, value in event.headers or ()}
            answer.http_status = int(fields.get(":status", answer.http_status))
            if "grpc-status" in fields:
                answer.status = int(fields["grpc-status"])
                answer.message = unquote(fields.get("grpc-message", ""))
            answer.trailers |= fields
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data or b""
        elif isinstance(event, h2.events.StreamEnded):
            answer.is_ended = True
        elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
            answer.is_cut = answer.is_ended = True


def _headers(given: GrpcInput) -> list[tuple[bytes, bytes]]:
    usual = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", given.path),
        (b":authority", b"127.0.0.1"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    names = {name for name, _ in given.headers}
    return [pair for pair in usual if pair[0] not in names] + [*given.headers, *given.shown]
