"""Requests over HTTP as inputs: good framing, and framing that is none."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HOST = b"host: 127.0.0.1\r\n"
JSON = b"content-type: application/json\r\n"
_METHODS = (
    b"GET",
    b"POST",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"get",
    b"\xff",
)
_TARGETS = (
    b"*",
    b"/",
    b"//",
    b"http://127.0.0.1/v1/models",
    b"http://[::1",
    b"127.0.0.1:80",
    b"/v1/models?\xff=%zz&&=",
    b"/%00",
    b"/%2e%2e/%2e%2e/etc/hostname",
    b"/..;/v1/models",
    b"/v1//chat/completions",
    b"/v1/models/",
    b"/v1/models/%2F..%2F",
    b"/v1/responses/",
    b"/api/pull",
    b"/api/blobs/sha256:0",
    b"/metrics/",
    b"/\xff\xfe",
    b"/" + b"a" * 70_000,
    b"/" + b"%41" * 9000,
    b"",
    b"/v1/chat/completions#x",
    b"/ HTTP/1.1\r\nx: y",
    b"/openapi.json?" + b"a=b&" * 5000,
)
_CHUNK_SIZES = (
    b"-1",
    b"ffffffffffffffff",
    b"fffffffffffffffff",
    b"0x5",
    b" 5",
    b"5 ",
    b"",
    b"g",
    b"5;" + b"a" * 9000,
    b"5;a=\x00",
    b"+5",
    b"7fffffff",
    b"00000000000000000005",
)


@dataclass(frozen=True)
class HttpInput:
    """``answers``: complete requests in ``data``, each of which must be answered; 0: the connection may just close.
    ``method``: of the first. ``leaves_after``: bytes of the answer after which the client goes away; None: it waits for
    the end."""

    kind: str
    method: str
    data: bytes
    answers: int = 1
    leaves_after: int | None = None


def request(method: str, target: bytes, headers: bytes, body: bytes) -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return method.encode() + b" " + target + b" HTTP/1.1\r\n" + HOST + headers + length + b"\r\n" + body


def _request_line(path: bytes, body: bytes, rng: Random) -> HttpInput:
    method, target = rng.choice(_METHODS), rng.choice((*_TARGETS, path))
    version = rng.choice(
        (
            b"HTTP/1.1",
            b"HTTP/1.1",
            b"HTTP/1.0",
            b"HTTP/2.0",
            b"HTTP/9.9",
            b"HTTP/1.1\x00",
            b"",
            b"http/1.1",
            b"HTTP/1." + b"1" * 90,
        )
    )
    line = rng.choice((b" ", b" ", b"  ", b"\t")).join((method, target, version))
    return HttpInput("framing", "POST", line + b"\r\n" + HOST + b"connection: close\r\n\r\n", 0)


def _header_lines(path: bytes, body: bytes, rng: Random) -> HttpInput:
    line = rng.choice(
        (
            b"x: a\r\n b\r\n",
            b"x : y\r\n",
            b": y\r\n",
            b"x\r\n",
            b"x: \x00\r\n",
            b"x: a\rb\r\n",
            b"x: a\nb: c\n",
            b"\xffx: y\r\n",
            b"x: " + b"y" * 70_000 + b"\r\n",
            b"x: y\r\n" * 9000,
            b"host: other\r\n",
            b"x(y): z\r\n",
            b" x: y\r\n",
            b"x:\r\n\r\n\r\n",
            b"x-request-id: a\r\nx-request-id: b\r\n",
            b"connection: upgrade\r\nupgrade: websocket\r\n",
            b"connection: close, keep-alive, content-length\r\n",
            b"content-length: 0\r\n",
            b"x: \x7f\x80\r\n",
            b"x: y\r",
        )
    )
    return HttpInput("framing", "POST", request("POST", path, JSON + line, body), 0)


def _lengths(path: bytes, body: bytes, rng: Random) -> HttpInput:
    wrong = rng.choice(
        (
            b"-1",
            b"+5",
            b"0x10",
            b"1e3",
            b"",
            b" ",
            b"99999999999999999999999",
            b"5, 5",
            b"5,6",
            b"18446744073709551616",
            b"\xd9\xa3",
            b"16777217",
            b"4294967296",
        )
    )
    lines = rng.choice(
        (
            b"content-length: " + wrong + b"\r\n",
            b"content-length: 4\r\ncontent-length: 5\r\n",
            b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
            b"transfer-encoding: chunked\r\ncontent-length: 4\r\n",
            b"transfer-encoding: gzip, chunked\r\n",
            b"transfer-encoding: chunked, identity\r\n",
            b"transfer-encoding: xchunked\r\n",
            b"transfer-encoding:\x0bchunked\r\n",
            b"content-length: %d\r\n" % (len(body) + 400),
            b"content-length: %d\r\n" % max(0, len(body) - 3),
        )
    )
    return HttpInput("framing", "POST", b"POST " + path + b" HTTP/1.1\r\n" + HOST + JSON + lines + b"\r\n" + body, 0)


def _chunks(path: bytes, body: bytes, rng: Random) -> HttpInput:
    head = b"POST " + path + b" HTTP/1.1\r\n" + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n"
    good = b"%x\r\n%b\r\n" % (len(body), body)
    tail = rng.choice(
        (
            rng.choice(_CHUNK_SIZES) + b"\r\nabcde\r\n0\r\n\r\n",
            b"%x\r\n%bXX0\r\n\r\n" % (len(body), body),
            good + b"0\r\nx-trailer: 1\r\n\r\n",
            good + b"0\r\n" + b"x: y\r\n" * 9000 + b"\r\n",
            good + b"0\r\ncontent-length: 3\r\n\r\n",
            b"1\r\n{\r\n" * 900,
            good.replace(b"\r\n", b"\n") + b"0\n\n",
            good + b"0",
            b"0\r\n\r\n" + rng.randbytes(30),
        )
    )
    return HttpInput("framing", "POST", head + tail, 0)


def _pipelined(path: bytes, body: bytes, rng: Random) -> HttpInput:
    number = rng.choice((2, 3, 12))
    requests = (b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n") * number
    if rng.random() < 0.5:
        return HttpInput("pipelined", "GET", requests, number)
    # What is none ends the connection, and with it what was asked before.
    return HttpInput("framing", "GET", requests + rng.choice((b"\r\n", b"GARBAGE", rng.randbytes(50))), 0)


def _not_http(path: bytes, body: bytes, rng: Random) -> HttpInput:
    data = rng.choice(
        (
            rng.randbytes(rng.choice((1, 20, 3000))),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300),
            b"GET /v1/models\r\n",
            b"\r\n" * 500,
            body,
            b"SSH-2.0-x\r\n",
        )
    )
    return HttpInput("framing", "POST", data, 0)


BROKEN: tuple[Callable[[bytes, bytes, Random], HttpInput], ...] = (
    _request_line,
    _header_lines,
    _lengths,
    _chunks,
    _pipelined,
    _not_http,
)
"""Each takes a path, a body and the randomness."""
