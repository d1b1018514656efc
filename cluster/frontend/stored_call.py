"""A client's request as a leader keeps it, so that another front end can go on with it."""

from dataclasses import dataclass
from typing import Self

import msgspec

from cluster.errors import UnknownStream


class StoredCall(msgspec.Struct, frozen=True):
    """``kind``: which API it came over. ``body``: what came. ``created_unix_s``: when. ``seeds`` and ``max_tokens``: of
    each prompt, as they were decided then. ``tenant``: who may come back for it; empty: earlier versions did not say.
    ``trace``: W3C ``traceparent`` of the call; empty where nobody traced it.
    """

    kind: str
    call_id: str
    body: bytes
    created_unix_s: float
    seeds: list[int] = []
    max_tokens: list[int] = []
    tenant: str = ""
    trace: str = ""

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises UnknownStream where another version wrote it."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise UnknownStream(f"another version of the server keeps this request: {error}") from error


@dataclass(frozen=True)
class Holder:
    """Who has one sequence: a replica, in one life of its leader, under this name."""

    replica: str
    incarnation: int
    request_id: str


@dataclass(frozen=True)
class FoundCall:
    """A request that leaders have: what it is, and who has which of its sequences."""

    stored: StoredCall
    holders: dict[int, Holder]
