"""Lists of small whole numbers as bytes: little-endian int32 one after another, which take no time to encode."""

import sys
from array import array
from collections.abc import Iterable

from engine.errors import ProtocolViolation

_NUM_BYTES = 4
assert sys.byteorder == "little", "packed numbers are the host's own"


def pack(numbers: Iterable[int]) -> bytes:
    return array("i", numbers).tobytes()


def num_packed(data: bytes) -> int:
    return len(data) // _NUM_BYTES


def unpack(data: bytes) -> list[int]:
    """Raises ProtocolViolation where these are not whole numbers."""
    if len(data) % _NUM_BYTES:
        raise ProtocolViolation(f"{len(data)} bytes do not hold numbers of {_NUM_BYTES} bytes")
    return memoryview(data).cast("i").tolist()
