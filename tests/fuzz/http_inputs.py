"""What is sent over HTTP: input number i of a seed is the same bytes every time."""

import gzip
from collections.abc import Callable
from random import Random
from urllib.parse import quote

from tests.fuzz import hostile
from tests.fuzz.bodies import MODEL, USUAL, Bodies, Operation, filled
from tests.fuzz.header_values import HEADERS
from tests.fuzz.http_framing import BROKEN, HOST, JSON, HttpInput, request


class HttpInputs:
    """Args:
    bodies: the operations.
    """

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._kinds: dict[Callable[[Random], HttpInput], int] = {
            self._mutated: 45,
            self._damaged: 12,
            self._garbage: 8,
            self._headers: 14,
            self._paths: 9,
            self._framing: 9,
            self._gone: 3,
        }

    def make(self, rng: Random) -> HttpInput:
        (maker,) = rng.choices(list(self._kinds), list(self._kinds.values()))
        return maker(rng)

    def _mutated(self, rng: Random) -> HttpInput:
        """A good body with one value, or a few, that are not."""
        operation, body = self._body(rng)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            body = hostile.mutated(body, rng)
        return _posted("mutated", operation.path, hostile.encoded(body, rng), rng)

    def _damaged(self, rng: Random) -> HttpInput:
        operation, body = self._body(rng)
        return _posted("damaged", operation.path, hostile.damaged(hostile.encoded(body, rng), rng), rng)

    def _garbage(self, rng: Random) -> HttpInput:
        operation = rng.choice(self._bodies.taking_bodies)
        data = (
            rng.randbytes(rng.choice((0, 1, 40, 5000)))
            if rng.random() < 0.4
            else hostile.encoded(hostile.value(rng), rng)
        )
        return _posted("garbage", operation.path, data, rng)

    def _headers(self, rng: Random) -> HttpInput:
        operation, body = self._body(rng)
        names = rng.sample(list(HEADERS), rng.choice((1, 1, 2, 3)))
        data = hostile.encoded(body, rng)
        if "content-encoding" in names and rng.random() < 0.5:
            data = gzip.compress(data, mtime=0)
        lines = b"".join(f"{name}: {rng.choice(HEADERS[name])}\r\n".encode("latin-1", "replace") for name in names)
        plain = b"" if "content-type" in names else JSON
        return HttpInput("headers", "POST", request("POST", operation.path.encode(), lines + plain, data))

    def _paths(self, rng: Random) -> HttpInput:
        """Names in paths, queries, methods."""
        operation = rng.choice(self._bodies.operations)
        name = rng.choice((hostile.text(rng), MODEL, "resp_" + "0" * 32, "resp_0/../..", "nobody"))
        path = filled(operation.path, quote(name.encode("utf-8", "surrogatepass"), safe=rng.choice(("", "/%")))[:9000])
        pairs = []
        for key in (*operation.query, "zz"):
            given = rng.choice(
                (*USUAL.get(key, ("true", "17")), "", "-1", "9" * 30, "٣", "\0", "nan", "2026-13-45", "٢٠٢٦-٠١-٠١")
            )
            pairs += [f"{key}={quote(str(given))}"] * rng.choice((0, 1, 1, 2, 400))
        target = f"{path}?{'&'.join(pairs)}" if pairs else path
        method = (
            operation.method
            if rng.random() < 0.8
            else rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"))
        )
        body = b"" if method in ("GET", "HEAD") else b"{}"
        return HttpInput("paths", method, request(method, target.encode("latin-1", "replace"), JSON, body))

    def _framing(self, rng: Random) -> HttpInput:
        operation, body = self._body(rng)
        data = hostile.encoded(body, rng)
        return rng.choice(BROKEN)(operation.path.encode(), data, rng)

    def _gone(self, rng: Random) -> HttpInput:
        """A good request whose client goes away: at once, or in the middle of the answer."""
        operation, body = self._body(rng)
        if "stream" in body or rng.random() < 0.7:
            body["stream"] = True
        asked = request("POST", operation.path.encode(), JSON, hostile.encoded(body, rng))
        return HttpInput("gone", "POST", asked, 0, rng.choice((0, 1, 200, 700)))

    def _body(self, rng: Random) -> tuple[Operation, dict[str, object]]:
        operation = rng.choice(self._bodies.taking_bodies)
        return operation, self._bodies.good(operation, rng)


def _posted(kind: str, path: str, body: bytes, rng: Random) -> HttpInput:
    if rng.random() < 0.15:
        head = b"POST " + path.encode() + b" HTTP/1.1\r\n" + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n"
        return HttpInput(kind, "POST", head + _in_chunks(body, rng) + b"0\r\n\r\n")
    return HttpInput(kind, "POST", request("POST", path.encode(), JSON, body))


def _in_chunks(body: bytes, rng: Random) -> bytes:
    made, start = b"", 0
    while start < len(body):
        size = rng.choice((1, 3, 100, 4000)) if len(body) < 500 else 4000
        piece = body[start : start + size]
        made += b"%x\r\n%b\r\n" % (len(piece), piece)
        start += size
    return made
