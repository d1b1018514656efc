"""Sends an input over a connection of its own and reads what comes back, as strictly as HTTP/1.1 is written."""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass

import h11

from tests.fuzz.http_framing import HttpInput

ANSWER_S = 90.0
"""What takes longer hangs. An input that is good after all may ask for a whole context of tokens: 25 s beside other
tests."""
_GRACE_S = 0.05
"""For an answer to what is no whole request, before the client ends its side; time limits have tests of their own."""
_TLS_GRACE_S = 0.3
"""The same over TLS, where a client cannot end its side alone: then it leaves."""
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class HttpAnswer:
    """``status`` 0: the connection was closed without a word."""

    status: int
    headers: dict[str, str]
    body: bytes


class BadAnswer(Exception):
    """What came is not HTTP, or did not come."""


async def connect(
    host: str, port: int, tls: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """``tls``: None: in clear text."""
    return await asyncio.open_connection(host, port, ssl=tls)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Over TLS without its farewell, which the other side need not answer."""
    if writer.get_extra_info("ssl_object") is not None:
        writer.transport.abort()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def ask(host: str, port: int, given: HttpInput, tls: ssl.SSLContext | None = None) -> list[HttpAnswer]:
    """As many answers as the input has requests; of one that is none, at most one. Raises BadAnswer."""
    reader, writer = await connect(host, port, tls)
    try:
        async with asyncio.timeout(ANSWER_S):
            with contextlib.suppress(ConnectionError):  # it need not read to the end
                writer.write(given.data)
                await writer.drain()
            if given.leaves_after is not None:
                if given.leaves_after:
                    await reader.read(given.leaves_after)
                return []
            if given.answers:
                return await _answers(reader, given.method, given.answers)
            return await _perhaps(reader, writer, given.method)
    except TimeoutError:
        raise BadAnswer(f"nothing came within {ANSWER_S} s") from None
    finally:
        await hang_up(writer)


async def ask_in_clear(host: str, port: int, data: bytes) -> bytes:
    """Whatever comes back from a port that speaks TLS. Raises BadAnswer."""
    reader, writer = await connect(host, port)
    found = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            with contextlib.suppress(OSError):  # it need not read to the end
                writer.write(data)
                writer.write_eof()
                while piece := await reader.read(_READ_BYTES):
                    found += piece
    except TimeoutError:
        raise BadAnswer(f"the connection was left open for {ANSWER_S} s") from None
    finally:
        await hang_up(writer)
    return found


async def _perhaps(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str) -> list[HttpAnswer]:
    """Of what is no whole request."""
    data, is_ended = b"", False
    can_end = writer.can_write_eof()
    try:
        while True:
            try:
                async with asyncio.timeout(None if is_ended else _GRACE_S if can_end else _TLS_GRACE_S):
                    piece = await reader.read(_READ_BYTES)
            except TimeoutError:
                if not can_end:
                    break
                is_ended = True
                writer.write_eof()
                continue
            if not piece:
                break
            data += piece
    except OSError:
        pass  # It cuts those who send on.
    if not data:
        return [HttpAnswer(0, {}, b"")]
    ended = asyncio.StreamReader()
    ended.feed_data(data)
    ended.feed_eof()
    # What the server took for the method decides whether a body follows: the input does not say.
    method = (
        "HEAD" if b"content-length" in data.partition(b"\r\n\r\n")[0].lower() and data.endswith(b"\r\n\r\n") else method
    )
    try:
        return await _answers(ended, method, 1)
    except BadAnswer as error:
        if str(error).startswith("cut"):
            return []  # An answer that began before the client ended its side.
        raise


async def _answers(reader: asyncio.StreamReader, method: str, number: int) -> list[HttpAnswer]:
    answers: list[HttpAnswer] = []
    connection = _client(method)
    while True:
        try:
            answers.append(await _one(reader, connection))
        except h11.RemoteProtocolError as error:
            if not reader.at_eof():
                raise BadAnswer(f"not HTTP: {error}") from None
            raise BadAnswer(f"cut after {len(answers)} answers: {error}") from None
        except OSError as error:
            raise BadAnswer(f"cut after {len(answers)} answers: {error}") from None
        if len(answers) == number:
            return answers
        rest, _ = connection.trailing_data
        connection = _client(method)
        connection.receive_data(rest) if rest else None


def _client(method: str) -> h11.Connection:
    connection = h11.Connection(our_role=h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    return connection


async def _one(reader: asyncio.StreamReader, connection: h11.Connection) -> HttpAnswer:
    status, headers, body = 0, {}, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return HttpAnswer(status, headers, body)
        elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the connection ended")
