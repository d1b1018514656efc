"""What is sent over gRPC: input number i of a seed is the same every time."""

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from google.protobuf.message import Message

from tests.fuzz import hostile, messages
from tests.fuzz.messages import Method

_CONTENT_TYPES = (
    b"application/json",
    b"application/grpc+json",
    b"application/grpc-web",
    b"text/html",
    b"",
    b"application/grpc;x",
    b"application/grpcfoo",
    b"\xff",
    b"application/grpc+proto",
)
_TIMEOUTS = (
    b"0n",
    b"-1S",
    b"1",
    b"99999999H",
    b"999999999H",
    b"1X",
    b"",
    b"S",
    b"0S",
    b"1n",
    b"\xff",
    b"1e3S",
    b"00000001m",
)
_METADATA: tuple[tuple[bytes, bytes], ...] = (
    (b"x-bin", b"!!!"),
    (b"x-bin", base64.b64encode(b"\0" * 900)),
    (b"x", b"a" * 7000),
    (b"x", b"\x80\xff"),
    (b"x", b"a\r\nb: c"),
    (b"x\r\ny", b"z"),
    (b"X-Upper", b"a"),
    (b"authorization", b"Bearer " + b"a" * 900),
    (b"authorization", b"\x80"),
    (b"x-api-key", b"\xff"),
    (b"x-remuda-tenant", b"a"),
    (b"x-remuda-priority", b"nan"),
    (b"traceparent", b"00-zz"),
    (b"traceparent", b"00-" + b"1" * 32 + b"-" + b"1" * 16 + b"-01"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"none"),
    (b"grpc-accept-encoding", b",,,"),
    (b"grpc-status", b"0"),
    (b":method", b"GET"),
    (b":authority", b""),
    (b":path", b"/"),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"content-length", b"3"),
    (b"host", b"a b"),
    (b"te", b"gzip"),
    (b"", b"a"),
    (b":", b"a"),
    (b"grpc-tags-bin", b"AAAA"),
    (b"user-agent", b"a" * 5000),
    (b"cookie", b"a=b" * 900),
)
_PATHS = (
    b"/",
    b"",
    b"//",
    b"/remuda.v1.Inference",
    b"/remuda.v1.Inference/",
    b"/remuda.v1.Inference/Nothing",
    b"/remuda.v1.Replica/Attach",
    b"remuda.v1.Inference/Generate",
    b"/a" * 3000,
    b"/\xff/\xff",
    b"/remuda.v1.Inference/Generate?x",
    b"/v1/models",
)


@dataclass(frozen=True)
class GrpcInput:
    """A call.

    ``data``: its one message's bytes, or with ``is_raw`` the stream's. ``headers``: beside, or instead of, those that a
    call has. ``leaves``: the client resets the stream. ``tears``: instead of a call, ``data`` goes into the connection.
    ``shown``: more metadata, of who calls; ``is_text``: it is printable ASCII.

    ``is_proper``: gRPC's own rules are kept, so that the answer is a status that we choose.
    """

    kind: str
    path: bytes
    data: bytes
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())
    is_raw: bool = False
    leaves: bool = False
    tears: bool = False
    shown: tuple[tuple[bytes, bytes], ...] = field(default=())
    is_text: bool = True

    @property
    def is_proper(self) -> bool:
        return self.is_text and not (self.is_raw or self.headers or self.tears)


class GrpcInputs:
    def __init__(self) -> None:
        self._methods = messages.methods()
        self._kinds: dict[Callable[[Random], GrpcInput], int] = {
            self._spoilt: 50,
            self._bytes: 22,
            self._frames: 10,
            self._headers: 12,
            self._gone: 3,
            self._torn: 3,
        }

    def make(self, rng: Random) -> GrpcInput:
        (maker,) = rng.choices(list(self._kinds), list(self._kinds.values()))
        return maker(rng)

    def _spoilt(self, rng: Random) -> GrpcInput:
        method, message = self._good(rng)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            messages.spoilt(message, rng)
        data = messages.harmless(method, message.SerializeToString())
        return GrpcInput("spoilt", method.path.encode(), data)

    def _bytes(self, rng: Random) -> GrpcInput:
        """Bytes that may be no message at all, or one with unknown fields."""
        method, message = self._good(rng)
        act = rng.randrange(3)
        if act == 0:
            data = rng.randbytes(rng.choice((1, 5, 40, 3000)))
        elif act == 1:
            data = hostile.damaged(message.SerializeToString(), rng)
        else:
            # A message in a message in a message: field 5, length-delimited.
            data = b""
            for _ in range(rng.choice((50, 99, 101, 3000))):
                data = b"\x2a" + _varint(len(data)) + data
        return GrpcInput("bytes", method.path.encode(), messages.harmless(method, data))

    def _frames(self, rng: Random) -> GrpcInput:
        """Messages whose length or flags are not what follows, none, or several."""
        method, message = self._good(rng)
        if method.path == messages.DRAIN:
            return self._frames(rng)  # what remains of such bytes may ask the whole front end to drain
        data = message.SerializeToString()
        made = rng.choice(
            (
                b"",
                b"\0",
                b"\0\0\0",
                struct.pack(">BI", 0, len(data) + 7) + data,
                struct.pack(">BI", 0, 2**32 - 1) + data,
                struct.pack(">BI", 0, 70 * 2**20) + data,
                struct.pack(">BI", 1, len(data)) + data,
                struct.pack(">BI", 1, len(zlib.compress(data))) + zlib.compress(data),
                struct.pack(">BI", 255, len(data)) + data,
                (struct.pack(">BI", 0, len(data)) + data) * 3,
                struct.pack(">BI", 0, len(data)) + data + b"\0\0",
                data,
                rng.randbytes(30),
            )
        )
        return GrpcInput("frames", method.path.encode(), made, is_raw=True)

    def _headers(self, rng: Random) -> GrpcInput:
        method, message = self._good(rng)
        path = rng.choice(_PATHS) if rng.random() < 0.2 else method.path.encode()
        headers: tuple[tuple[bytes, bytes], ...]
        act = rng.randrange(4)
        if act == 0:
            headers = ((b"content-type", rng.choice(_CONTENT_TYPES)),)
        elif act == 1:
            headers = ((b"grpc-timeout", rng.choice(_TIMEOUTS)),)
        else:
            headers = tuple(rng.sample(_METADATA, rng.choice((1, 1, 3))))
        return GrpcInput("headers", path, messages.harmless(method, message.SerializeToString()), headers)

    def _gone(self, rng: Random) -> GrpcInput:
        method, message = self._good(rng)
        data = messages.harmless(method, message.SerializeToString())
        return GrpcInput("gone", method.path.encode(), data, leaves=True)

    def _torn(self, rng: Random) -> GrpcInput:
        """Bytes in the place of HTTP/2's frames."""
        frame = struct.pack(">I", rng.choice((0, 5, 16384, 2**24 - 1)))[1:] + rng.randbytes(rng.choice((1, 6, 40)))
        data = rng.choice((rng.randbytes(200), frame, frame * 30, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"))
        return GrpcInput("torn", b"", data, tears=True)

    def _good(self, rng: Random) -> tuple[Method, Message]:
        method = rng.choice(self._methods)
        return method, messages.good(method, rng)


def _varint(number: int) -> bytes:
    made = b""
    while number > 127:
        made += bytes([number & 127 | 128])
        number >>= 7
    return made + bytes([number])
