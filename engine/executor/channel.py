"""The channel seam: how bytes go from a gang's leader to its ranks and back.

Messages arrive whole, once, and in order. Each transport is a file of its own: queue_channel (one process),
socket_hub and socket_rank (one host or several), relay (one connection for all ranks of another host).
"""

from typing import Protocol

from engine.errors import EngineFailure
from engine.executor.progress_area import SlotMemory
from engine.progress import RankSample

MAX_FRAME_BYTES = 256 * 2**20
"""Longest message. A frame that claims to be longer is malformed: nobody allocates what a stranger asks for."""


class ChannelClosed(EngineFailure):
    """The other side is gone, or this side was closed."""


class LeaderChannel(Protocol):
    """The leader's end: one sender thread and one receiver thread may use it at once."""

    def send(self, data: bytes) -> None:
        """One message to every rank. Raises RankFailure where a rank is gone or does not read; ``receive`` tells that
        as well, behind what the rank said before."""
        ...

    def receive(self, timeout_s: float | None) -> tuple[int, bytes]:
        """The next message of any rank, with the rank's number.

        Raises RankFailure (once for each rank) when a rank's connection ended, TimeoutError after ``timeout_s``
        seconds (None waits for ever), and ChannelClosed after ``close``.
        """
        ...

    def wait_lost(self) -> None:
        """Returns when there may be a RankFailure to receive or this end was closed, whatever other threads do."""
        ...

    def progress(self) -> list[RankSample]:
        """Where each rank is, in order of rank, without asking any. After ``close``: nothing."""
        ...

    def close(self) -> None:
        """Ends all connections, which ranks take as an order to exit. May be called twice and from any thread."""
        ...


class RankChannel(Protocol):
    """A rank's end. Any thread may send; one thread receives."""

    def send(self, data: bytes) -> None:
        """Raises ChannelClosed where the leader is gone."""
        ...

    def receive(self, timeout_s: float | None) -> bytes:
        """The leader's next message. Raises ChannelClosed, or TimeoutError after ``timeout_s`` seconds."""
        ...

    def wait_closed(self) -> None:
        """Returns when the leader is gone or this end was closed, whatever other threads do meanwhile."""
        ...

    def progress_slot(self) -> SlotMemory:
        """Where the leader reads this rank's progress; memory of its own where nobody can."""
        ...

    def close(self) -> None:
        """May be called twice and from any thread."""
        ...
