"""What clients can do to a connection without a request, or beside one: every bound of HttpLimits."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import repeat

import pytest

from cluster.frontend.answers import HttpSettings
from cluster.frontend.http_protocol import HttpLimits
from tests.frontend.bodies import completion
from tests.frontend.scripted import Gate, says
from tests.frontend.servers import Served, served
from tests.frontend.test_stuck_readers import endless

LIMITS = HttpLimits()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"


@asynccontextmanager
async def connected(one: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """What came before the connection was closed or reset."""
    parts = []
    try:
        while part := await asyncio.wait_for(reader.read(65536), 5):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    ("start", "unit", "status"),
    [
        (GET + b"x-a: ", b"a" * 4096, b"431"),
        (GET, b"x-a: y\r\n" * 500, b"431"),
        (b"GET /", b"a" * 4096, b"431"),
        (b"", b"\r\n" * 2048, b"431"),
        (CHUNKED + b"1;", b"a" * 4096, b"431"),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"x-a: y\r\n" * 500, b"431"),
    ],
    ids=["header value", "headers", "url", "line ends", "chunk extension", "trailers"],
)
async def test_a_head_without_end_is_refused(start: bytes, unit: bytes, status: bytes) -> None:
    async with served(says([300])) as one, connected(one) as (reader, writer):
        writer.write(start)
        num_bytes = 0
        for piece in repeat(unit):
            writer.write(piece)
            num_bytes += len(piece)
            if num_bytes > LIMITS.max_head_bytes + 40_000:
                break
        answer = await read_to_end(reader)
        assert answer.startswith(b"HTTP/1.1 " + status), answer
        assert b'"headers_too_large"' in answer
        assert (await one.http.get("/livez")).status_code == 200


@pytest.mark.parametrize("start", [b"\x16\x03\x01\0\xc8\x01", POST + b"x: \x00\r\n\r\n", CHUNKED + b"-1\r\n"])
async def test_what_is_no_http_is_refused_in_the_form_of_all_errors(start: bytes) -> None:
    async with served(says([300])) as one, connected(one) as (reader, writer):
        writer.write(start)
        head, _, body = (await read_to_end(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_request"


async def test_a_large_head_within_the_bound_is_fine() -> None:
    async with served(says([300])) as one:
        headers = {"x-a": "a" * (LIMITS.max_head_bytes - 4096)}
        assert (await one.http.post("/v1/completions", json=completion(), headers=headers)).status_code == 200


@pytest.mark.parametrize("start", [b"", b"GET /liv", GET, b"\r\n"])
async def test_a_head_has_its_time(start: bytes) -> None:
    async with served(says([300]), http_limits=replace(LIMITS, head_s=0.1)) as one, connected(one) as (reader, writer):
        writer.write(start)
        answer = await read_to_end(reader)
        assert answer.startswith(b"HTTP/1.1 408") if start else answer == b""


@pytest.mark.parametrize("start", [POST + b"content-length: 900\r\n\r\n{", CHUNKED + b"1\r\n{\r\n"])
async def test_a_body_must_move(start: bytes) -> None:
    limits = replace(LIMITS, body_window_s=0.1)
    async with served(says([300]), http_limits=limits) as one, connected(one) as (reader, writer):
        writer.write(start)
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 408")


async def test_a_body_that_moves_may_take_its_time() -> None:
    limits = replace(LIMITS, body_window_s=0.3, min_body_bytes=100)
    body = json.dumps(completion(user="x" * 2000)).encode()
    async with served(says([300]), http_limits=limits) as one, connected(one) as (reader, writer):
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 100):
            writer.write(body[start : start + 100])
            await asyncio.sleep(0.05)
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 200")


async def test_a_body_that_nobody_wants_ends_too() -> None:
    limits = replace(LIMITS, body_window_s=0.2)
    settings = HttpSettings(max_body_bytes=1000)
    async with served(says([300]), http_limits=limits, http=settings) as one, connected(one) as (reader, writer):
        writer.write(CHUNKED)

        async def send_on() -> None:
            while True:
                writer.write(b"1000\r\n" + b"a" * 4096 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(send_on())
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 413")
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_answers_take_as_long_as_they_take() -> None:
    """Neither line ends after the body nor the next request's beginning cut the answer that is on its way."""
    gate = Gate(before=[300], after=[301])
    limits = replace(LIMITS, head_s=0.1, body_window_s=0.1)
    body = json.dumps(completion()).encode()
    for early in (b"", b"\r\n", b"GET /li", GET + b"\r\n"):
        gate.opened.clear()
        async with served(gate, http_limits=limits) as one, connected(one) as (reader, writer):
            writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            await one.backend.until(lambda: bool(one.backend.live))
            writer.write(early)
            await asyncio.sleep(0.4)
            gate.opened.set()
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200"), (early, head)


async def test_hundreds_of_slow_clients_hold_up_nobody() -> None:
    """Slowloris: headers without end, one now and then. Each is cut, and others are served meanwhile."""
    async with served(says([300]), http_limits=replace(LIMITS, head_s=1.0)) as one:

        async def dribble() -> bytes:
            async with connected(one) as (reader, writer):
                writer.write(GET)
                reading = asyncio.create_task(read_to_end(reader))
                while not reading.done():
                    writer.write(b"x-a: y\r\n")
                    await asyncio.wait({reading}, timeout=0.1)
                return reading.result()

        slow = [asyncio.create_task(dribble()) for _ in range(300)]
        num_served = 0
        while not all(task.done() for task in slow):
            answer = await one.http.post("/v1/completions", json=completion())
            assert answer.status_code == 200 and answer.elapsed.total_seconds() < 1
            num_served += 1
        assert num_served > 5
        assert all(task.result().startswith(b"HTTP/1.1 408") for task in slow)


async def test_connections_are_counted() -> None:
    async with served(says([300]), http_limits=replace(LIMITS, max_connections=2)) as one:
        async with connected(one), connected(one), connected(one) as (reader, _):
            assert (await read_to_end(reader)).startswith(b"HTTP/1.1 503")
        for _ in range(100):
            async with connected(one) as (reader, writer):
                writer.write(GET + b"connection: close\r\n\r\n")
                if (await read_to_end(reader)).startswith(b"HTTP/1.1 200"):
                    break
        else:
            pytest.fail("room was not given back")


async def test_uploads_that_are_broken_off_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    async with served(says([300])) as one:
        for _ in range(3):
            async with connected(one) as (_, writer):
                writer.write(POST + b"content-length: 900\r\n\r\n{")
                await writer.drain()
        route = 'remuda_http_responses_total{route="/v1/completions",status="499"} 3.0'
        async with asyncio.timeout(5):
            while route not in (await one.http.get("/metrics")).text:
                pass
        assert caplog.text == ""


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_a_client_that_takes_nothing_is_cut(path: str) -> None:
    """A stream, and an answer that is written at once."""
    async with served(endless, http_limits=replace(LIMITS, write_stall_s=0.3)) as one:
        one.backend.infos = [replace(one.backend.infos[0], max_model_len=1_000_000)]
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", one.front_end.port))
            body = json.dumps(completion(prompt="a b" * 500_000, return_token_strs=True))
            if path == "/v1/completions":
                body = json.dumps(completion(stream=True, logprobs=20))
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(client, (head + body).encode())
            connections = one.front_end._http._server.server_state.connections
            async with asyncio.timeout(10):
                while not connections:  # noqa: ASYNC110  uvicorn's set tells nobody
                    await asyncio.sleep(0.01)
                while connections:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await one.front_end.service.admission.wait_idle()
