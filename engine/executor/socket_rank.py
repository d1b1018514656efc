"""A rank's end of a channel over a Unix or TCP socket."""

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

from engine.errors import ProtocolViolation
from engine.executor.channel import ChannelClosed
from engine.executor.frames import Frame, FrameKind, FrameReader, frame_head
from engine.executor.handshake import greet_leader
from engine.executor.plan_ring import PlanRingReader
from engine.executor.progress_area import SlotMemory, open_slot, private_slot
from engine.executor.sockets import connect_when_open, send_all
from engine.progress import identify

_RECEIVE_BYTES = 2**18


class SocketRankChannel:
    """Speaks for ``ranks``: one, or for a relay those of its host. ``give_up``: asked while nobody listens yet.

    Raises ChannelClosed where the leader cannot be reached or does not prove itself.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        ranks: Sequence[int],
        timeout_s: float,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rank = ranks[0]
        try:
            self._socket = connect_when_open(address, timeout_s, give_up)
        except OSError as error:
            raise ChannelClosed(f"the leader at {address} cannot be reached: {error}") from error
        try:
            descriptors = greet_leader(self._socket, secret, ranks, timeout_s)
        except (OSError, ProtocolViolation) as error:
            self._socket.close()
            raise ChannelClosed(f"the leader at {address} did not let rank {self._rank} in: {error}") from error
        self._ring, self._slot = None, private_slot()
        if descriptors is not None:
            self._ring, self._slot = PlanRingReader(descriptors[0]), open_slot(descriptors[1], self._rank)
            identify(self._slot)  # it may be stopped before it has anything to compute
        self._reader = FrameReader()
        self._frames: deque[Frame] = deque()
        self._send_lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._closed = False

    def send(self, data: bytes) -> None:
        self.send_frame(FrameKind.MESSAGE, self._rank, data)

    def send_frame(self, kind: FrameKind, rank: int, data: bytes) -> None:
        """For relays, which speak for several ranks."""
        consumed = 0 if self._ring is None else self._ring.consumed
        head = frame_head(kind, len(data), rank, consumed)
        with self._send_lock:
            try:
                send_all(self._socket, head + data)
            except OSError as error:
                raise ChannelClosed(f"the leader is gone: {error}") from error

    def receive(self, timeout_s: float | None) -> bytes:
        while not self._frames:
            if timeout_s is not None and not self._poll.poll(timeout_s * 1000):
                raise TimeoutError(f"nothing from the leader within {timeout_s} s")
            self._read()
        frame = self._frames.popleft()
        if frame.kind == FrameKind.MESSAGE:
            return frame.payload
        if frame.kind == FrameKind.IN_RING and self._ring is not None:
            return self._ring.read(frame.position, frame.num_bytes)
        raise ProtocolViolation(f"the leader sent a frame of kind {frame.kind.name} that it may not send here")

    def _read(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise ChannelClosed(f"the leader is gone: {error}") from error
        if not data:
            raise ChannelClosed("the leader closed the channel")
        self._frames.extend(self._reader.feed(data))

    def progress_slot(self) -> SlotMemory:
        return self._slot

    def wait_closed(self) -> None:
        """Asks the kernel for nothing but the hang-up, so it costs no processor time and takes no data."""
        try:
            fd = os.dup(self._socket.fileno())
        except OSError:
            return  # closed already
        try:
            poll = select.poll()
            poll.register(fd, select.POLLRDHUP)
            poll.poll()
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # the peer may be faster
            # Wakes whoever waits in receive or wait_closed; close alone would not.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
