"""When readers that have news are woken: at once while the event loop keeps up, less often when it does not.

What a reader does with its tokens (detokenize, write a message to its client) costs the same for one token as for ten.
So where waking all readers keeps the loop busy for some time, it is then left in peace for as long again: frames go on
arriving, tokens are merged, and the next round of messages carries more of them. A loop that is idle when a frame
arrives adds no delay, a busy one at most ``MAX_DELAY_S``.
"""

import asyncio

from cluster.replica.stream_buffer import StreamBuffer

MAX_DELAY_S = 0.02
_NUM_TURNS = 4
"""Turns of the loop in which a woken reader's tokens reach the client's socket: it wakes others, they write."""


class WakePacer:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._buffers: dict[StreamBuffer, None] = {}
        """In the order in which they came, so that a simulated run can be repeated."""
        self._is_working = False
        self._work_began_s = 0.0
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, buffer: StreamBuffer) -> None:
        """This one's reader has news."""
        self._buffers[buffer] = None

    def wake(self) -> None:
        """All of a frame is added: wakes the readers now, or plans to."""
        if self._is_working or self._timer is not None or not self._buffers:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next_s:
            self._wake_all()
        else:
            self._timer = loop.call_at(self._next_s, self._wake_all)

    def close(self) -> None:
        """Wakes whoever waits, and plans nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for buffer in self._buffers:
            buffer.wake()
        self._buffers.clear()

    def _wake_all(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        self._is_working = True
        self._work_began_s = loop.time()
        for buffer in self._buffers:
            buffer.wake()
        self._buffers.clear()
        loop.call_soon(self._turn, _NUM_TURNS)

    def _turn(self, num_left: int) -> None:
        """Runs once per turn of the loop, behind what the readers do in it."""
        loop = asyncio.get_running_loop()
        if num_left > 0:
            loop.call_soon(self._turn, num_left - 1)
            return
        now_s = loop.time()
        self._is_working = False
        self._next_s = now_s + min(now_s - self._work_began_s, MAX_DELAY_S)
        self.wake()
