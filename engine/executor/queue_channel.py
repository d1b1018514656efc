"""The channel of a gang that is one thread of the leader's own process."""

import queue
import threading

from engine.errors import RankFailure
from engine.executor.channel import ChannelClosed, LeaderChannel, RankChannel
from engine.executor.progress_area import ProgressArea, SlotMemory
from engine.progress import RankSample

_Messages = queue.SimpleQueue[bytes | None]
"""None: the other end was closed."""


class _Pipe:
    """Two queues and the fact that one end was closed."""

    def __init__(self) -> None:
        self.to_rank: _Messages = queue.SimpleQueue()
        self.to_leader: _Messages = queue.SimpleQueue()
        self.closed = threading.Event()
        self.progress = ProgressArea([0])

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self.to_rank.put(None)
            self.to_leader.put(None)


class _QueueLeader:
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._closed_here = False
        self._reported = False

    def send(self, data: bytes) -> None:
        if self._pipe.closed.is_set():
            raise RankFailure("rank 0, a thread of this process, has ended", 0)
        self._pipe.to_rank.put(data)

    def receive(self, timeout_s: float | None) -> tuple[int, bytes]:
        if self._closed_here or self._reported:
            raise ChannelClosed("the channel was closed")
        data = _take(self._pipe.to_leader, timeout_s)
        if data is not None:
            return 0, data
        if self._closed_here:
            raise ChannelClosed("the channel was closed")
        self._reported = True
        raise RankFailure("rank 0, a thread of this process, has ended", 0)

    def wait_lost(self) -> None:
        self._pipe.closed.wait()

    def progress(self) -> list[RankSample]:
        return self._pipe.progress.read()

    def close(self) -> None:
        self._closed_here = True
        self._pipe.close()
        self._pipe.progress.close()


class _QueueRank:
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    def send(self, data: bytes) -> None:
        if self._pipe.closed.is_set():
            raise ChannelClosed("the leader is gone")
        self._pipe.to_leader.put(data)

    def receive(self, timeout_s: float | None) -> bytes:
        data = None if self._pipe.closed.is_set() else _take(self._pipe.to_rank, timeout_s)
        if data is None:
            raise ChannelClosed("the leader is gone")
        return data

    def progress_slot(self) -> SlotMemory:
        return self._pipe.progress.slot(0)

    def wait_closed(self) -> None:
        self._pipe.closed.wait()

    def close(self) -> None:
        self._pipe.close()


def _take(messages: _Messages, timeout_s: float | None) -> bytes | None:
    try:
        return messages.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no message within {timeout_s} s") from None


def queue_channel() -> tuple[LeaderChannel, RankChannel]:
    """Both ends. What the rank sent before it closed is still received."""
    pipe = _Pipe()
    return _QueueLeader(pipe), _QueueRank(pipe)
