"""The leader's end of a channel over sockets: local ranks by Unix socket and plan ring, remote ones by TCP.

One connection may speak for several ranks (a relay for those of its host), so a plan crosses each link once.
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

import msgspec

from engine.errors import ProtocolViolation, RankFailure
from engine.executor.channel import ChannelClosed
from engine.executor.connection_door import ConnectionDoor
from engine.executor.frames import Frame, FrameKind, FrameReader, frame_head
from engine.executor.plan_ring import PlanRing
from engine.executor.progress_area import ProgressArea, decode_samples
from engine.executor.sockets import send_all
from engine.progress import RankSample

RING_BYTES = 2**22
RING_MIN_BYTES = 2**13
"""Shorter messages go through the sockets themselves, which is as fast (bench of the channel in tests/unit)."""
_RECEIVE_BYTES = 2**18


class _Connection:
    """An authenticated connection and the ranks that it speaks for."""

    def __init__(self, link: socket.socket, ranks: tuple[int, ...]) -> None:
        self.link = link
        self.ranks = ranks
        self.reads_ring = link.family == socket.AF_UNIX
        self.reader = FrameReader()
        self.consumed = 0
        self.reason = "its connection ended"

    def lose(self, reason: str) -> list[tuple[int, bytes | RankFailure]]:
        return [(rank, RankFailure(f"rank {rank} is lost: {reason}", rank)) for rank in self.ranks]


class SocketHub:
    """Waits for ``ranks`` at ``addresses``; see engine.executor.channel.LeaderChannel for what it promises.

    ``addresses`` after construction are those to hand to ranks: port 0 has become a real one. When all ranks are
    connected, nothing listens any more.
    """

    def __init__(self, ranks: Collection[int], secret: str, addresses: Sequence[str]) -> None:
        self._awaited = set(ranks)
        self._connections: dict[int, _Connection] = {}
        """By file descriptor."""
        self._receivers: tuple[_Connection, ...] = ()
        """The same, for whoever sends; replaced as a whole."""
        self._arrived: deque[tuple[int, bytes | RankFailure]] = deque()
        self._input = memoryview(bytearray(_RECEIVE_BYTES))
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._closed = threading.Event()
        self._ring = PlanRing(RING_BYTES)
        self._progress = ProgressArea(ranks)
        self._reported: dict[int, tuple[float, RankSample]] = {}
        """By ranks of other hosts: when it arrived, and what their relay last said of them."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._watch_lock = threading.Lock()
        self._watch = select.epoll()
        self._watch.register(self._wake_fd, select.EPOLLIN)
        # Whoever waits for the address already may have to be admitted before the door has a name here.
        with self._lock:
            self._door = ConnectionDoor(addresses, secret, self._admit)
        self.addresses = self._door.addresses

    def _admit(self, link: socket.socket, ranks: tuple[int, ...], answer: bytes) -> bool:
        """Called by the door for every peer that proved itself."""
        with self._lock:
            if self._closed.is_set() or not self._awaited.issuperset(ranks) or len(set(ranks)) != len(ranks):
                return False
            if link.family == socket.AF_UNIX:
                socket.send_fds(link, [answer], [self._ring.fd, self._progress.fd])
            else:
                link.sendall(answer)
            self._awaited.difference_update(ranks)
            self._connections[link.fileno()] = _Connection(link, ranks)
            self._receivers = tuple(self._connections.values())
            self._epoll.register(link.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
            # A relay says in a frame which rank was lost; a rank's own connection just ends.
            news = select.EPOLLIN | select.EPOLLET if len(ranks) > 1 else 0
            self._watch.register(link.fileno(), news | select.EPOLLRDHUP)
            if not self._awaited:
                self._door.close()
            return True

    def send(self, data: bytes) -> None:
        with self._send_lock:
            self._send(data)

    def _send(self, data: bytes) -> None:
        if self._closed.is_set():
            raise ChannelClosed("the channel was closed")
        if self._awaited:
            with self._lock:  # the last may have its answer already, and not be noted yet
                rank = min(self._awaited, default=None)
            if rank is not None:
                raise RankFailure(f"rank {rank} is not connected", rank)
        connections = self._receivers
        inline: bytes | None = None
        ringed = self._write_to_ring(connections, data) if len(data) >= RING_MIN_BYTES else None
        for connection in connections:
            if ringed is not None and connection.reads_ring:
                frame = ringed
            else:
                inline = inline or frame_head(FrameKind.MESSAGE, len(data)) + data
                frame = inline
            try:
                send_all(connection.link, frame)
            except OSError as error:
                connection.reason = str(error)
                _shut(connection.link)
                rank = connection.ranks[0]
                raise RankFailure(f"rank {rank} is lost: {error}", rank) from error

    def _write_to_ring(self, connections: Sequence[_Connection], data: bytes) -> bytes | None:
        """The frame that names the place in the ring; None where the message has to go through the sockets."""
        readers = [connection.consumed for connection in connections if connection.reads_ring]
        if not readers:
            return None
        position = self._ring.write(data, min(readers))
        if position is None:
            return None
        return frame_head(FrameKind.IN_RING, len(data), position=position)

    def receive(self, timeout_s: float | None) -> tuple[int, bytes]:
        with self._receive_lock:
            rank, message = self._receive(timeout_s)
        if isinstance(message, RankFailure):
            raise message
        return rank, message

    def _receive(self, timeout_s: float | None) -> tuple[int, bytes | RankFailure]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._arrived or self._closed.is_set():
            if self._closed.is_set():
                raise ChannelClosed("the channel was closed")
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._epoll.poll(left)
            if not events and left is not None and left <= 0.0:
                raise TimeoutError(f"nothing from any rank within {timeout_s} s")
            for fd, _ in events:
                connection = self._connections.get(fd)
                if connection is not None:
                    self._arrived.extend(self._read(connection))
        return self._arrived.popleft()

    def wait_lost(self) -> None:
        with self._watch_lock:
            if not self._closed.is_set():
                self._watch.poll()

    def _read(self, connection: _Connection) -> list[tuple[int, bytes | RankFailure]]:
        messages: list[tuple[int, bytes | RankFailure]] = []
        try:
            num_bytes = connection.link.recv_into(self._input, 0, socket.MSG_DONTWAIT)
            if not num_bytes:
                raise ConnectionError(connection.reason)
            for frame in connection.reader.feed(self._input[:num_bytes]):
                if frame.kind == FrameKind.PROGRESS:
                    self._take_report(connection, frame)
                else:
                    messages.append(_open(connection, frame))
        except BlockingIOError:
            pass
        except (OSError, ProtocolViolation) as error:
            self._drop(connection)
            messages.extend(connection.lose(str(error)))
        return messages

    def _take_report(self, connection: _Connection, frame: Frame) -> None:
        """Raises ProtocolViolation."""
        try:
            samples = decode_samples(frame.payload)
        except msgspec.DecodeError as error:
            raise ProtocolViolation(f"a report of progress is malformed: {error}") from error
        now = time.monotonic()
        for sample in samples:
            if sample.rank not in connection.ranks:
                raise ProtocolViolation(f"a report on rank {sample.rank} on another rank's connection")
            self._reported[sample.rank] = now, sample

    def _drop(self, connection: _Connection) -> None:
        """Its ranks stay missing: a rank that comes back belongs to another epoch, and so to another hub."""
        with self._lock:
            del self._connections[connection.link.fileno()]
            self._receivers = tuple(self._connections.values())
            self._epoll.unregister(connection.link.fileno())
            self._watch.unregister(connection.link.fileno())
            self._awaited.update(connection.ranks)
            connection.link.close()

    def progress(self) -> list[RankSample]:
        with self._lock:
            samples = self._progress.read()
        now = time.monotonic()
        for i, sample in enumerate(samples):
            if (found := self._reported.get(sample.rank)) is not None:
                samples[i] = msgspec.structs.replace(found[1], report_age_s=now - found[0])
        return samples

    def close(self) -> None:
        self._door.close()
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            os.eventfd_write(self._wake_fd, 1)
            for connection in self._connections.values():
                _shut(connection.link)
        # Whoever was sending or receiving has been woken and leaves; then nobody uses the descriptors any more.
        with self._send_lock, self._receive_lock, self._watch_lock, self._lock:
            for connection in self._connections.values():
                connection.link.close()
            self._connections.clear()
            self._ring.close()
            self._progress.close()
            self._epoll.close()
            self._watch.close()
            os.close(self._wake_fd)


def _open(connection: _Connection, frame: Frame) -> tuple[int, bytes | RankFailure]:
    if frame.rank not in connection.ranks or frame.kind == FrameKind.IN_RING:
        raise ProtocolViolation(f"frame of kind {frame.kind.name} for rank {frame.rank} on another rank's connection")
    connection.consumed = max(connection.consumed, frame.position)
    if frame.kind == FrameKind.LOST:
        return frame.rank, RankFailure(f"rank {frame.rank} is lost: {frame.payload.decode()}", frame.rank)
    return frame.rank, frame.payload


def _shut(link: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer may be faster
        link.shutdown(socket.SHUT_RDWR)
