"""Frames on a socket: a 16-byte head, then the message, unless the message lies in shared memory (plan_ring).

No input or output happens here, so any split of the stream can be tested.
"""

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import ProtocolViolation
from engine.executor.channel import MAX_FRAME_BYTES

_HEAD = struct.Struct("<BxHIQ")
"""kind, rank, bytes of the message, ring position."""


class FrameKind(enum.IntEnum):
    """What a frame is."""

    MESSAGE = 1
    """The message follows. From a rank: ``position`` says how far it has read the plan ring."""
    IN_RING = 2
    """The message is in the plan ring at ``position``."""
    LOST = 3
    """From a relay: the connection of ``rank`` to it has ended; the message is text that says why."""
    PROGRESS = 4
    """From a relay: where its ranks are; the message is of engine.executor.progress_area."""


class Frame(NamedTuple):
    kind: FrameKind
    rank: int
    position: int
    num_bytes: int
    payload: bytes


def frame_head(kind: FrameKind, num_bytes: int, rank: int = 0, position: int = 0) -> bytes:
    """Raises ProtocolViolation where the message is longer than MAX_FRAME_BYTES."""
    if num_bytes > MAX_FRAME_BYTES:
        raise ProtocolViolation(f"a message of {num_bytes} bytes is too long; the most is {MAX_FRAME_BYTES}")
    return _HEAD.pack(kind, rank, num_bytes, position)


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that ``data`` completes. Raises ProtocolViolation at the first malformed head."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEAD.size:
                kind, rank, num_bytes, position = _HEAD.unpack_from(buffer, start)
                if not 1 <= kind <= len(FrameKind) or num_bytes > MAX_FRAME_BYTES:
                    raise ProtocolViolation(f"malformed frame: kind {kind}, {num_bytes} bytes")
                first = start + _HEAD.size
                end = first if kind == FrameKind.IN_RING else first + num_bytes
                if len(buffer) < end:
                    break
                start = end
                yield Frame(FrameKind(kind), rank, position, num_bytes, bytes(buffer[first:end]))
        finally:
            del buffer[:start]
