"""One TCP connection between two hosts, with the socket options of the step channel: how long a round trip takes, how
much of what is sent must be sent again, and how much it carries."""

import select
import socket
import statistics
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

from engine.executor import sockets

MESSAGE_BYTES = 1024
SILENCE_S = 3.0
"""A peer that says nothing for so long is not reached."""
_PING_S, _MAX_PINGS, _MIN_PINGS = 0.15, 400, 5
_TRICKLE_S, _TRICKLE_MESSAGES, _TRICKLE_BYTES = 0.3, 1200, 64
"""A few Mbit/s: what is lost then, no full queue has dropped."""
_BULK_WARM_S, _BULK_S = 0.1, 0.2
_CHUNK_BYTES = 2**18
# struct tcp_info of <linux/tcp.h>: offsets of three counters, and how much of it is read.
_TOTAL_RETRANS, _DATA_SEGS_OUT, _DSACK_DUPS, _INFO_BYTES = 100, 156, 216, 220
_LINGER_NOT = struct.pack("ii", 1, 0)


class Sent(NamedTuple):
    """Segments with data, and those that were sent again because they had been lost."""

    num_segments: int
    num_lost: int


@dataclass(frozen=True)
class TcpFacts:
    """As the side saw it that asked. ``bytes_per_s``: of the slower direction."""

    round_trip_s: float
    lost_share: float
    bytes_per_s: float


def sent_segments(connection: socket.socket) -> Sent:
    """Of a connection so far. What the peer says it had got already was sent again for nothing, and was not lost."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    total, segments = (struct.unpack_from("=I", info, offset)[0] for offset in (_TOTAL_RETRANS, _DATA_SEGS_OUT))
    # Kernels before 4.19 end the structure earlier.
    needless = struct.unpack_from("=I", info, _DSACK_DUPS)[0] if len(info) >= _INFO_BYTES else 0
    return Sent(segments, max(0, total - needless))


def ask(address: str) -> TcpFacts:
    """The side that connects, to one that runs ``answer``. Raises OSError."""
    with sockets.connect(address, SILENCE_S) as control:
        control.settimeout(SILENCE_S)
        round_trip_s = _ping(control)
        trickle(control)
        own = sent_segments(control)
        control.sendall(_pair(own.num_segments, own.num_lost))
        other = Sent(*(int(number) for number in _take_pair(control)))
        with sockets.connect(address, SILENCE_S) as connection:
            connection.settimeout(SILENCE_S)
            pour(connection)
        there, _ = _take_pair(control)
        with sockets.connect(address, SILENCE_S) as connection:
            connection.settimeout(SILENCE_S)
            back = drain(connection)
    segments = own.num_segments + other.num_segments
    return TcpFacts(round_trip_s, (own.num_lost + other.num_lost) / max(1, segments), min(there, back))


def answer(listener: socket.socket) -> None:
    """The other side: takes the three connections that ``ask`` makes. Raises OSError."""
    with _accept(listener) as control:
        while (message := _take(control, MESSAGE_BYTES))[:1] == b"p":
            control.sendall(message)
        trickle(control)
        _take_pair(control)
        control.sendall(_pair(*sent_segments(control)))
        with _accept(listener) as connection:
            control.sendall(_pair(drain(connection), 0.0))
        with _accept(listener) as connection:
            pour(connection)


def _accept(listener: socket.socket) -> socket.socket:
    listener.settimeout(2 * SILENCE_S)
    connection, _ = listener.accept()
    sockets.configure(connection)
    connection.settimeout(SILENCE_S)
    return connection


def _ping(control: socket.socket) -> float:
    took_s: list[float] = []
    begun_s = time.monotonic()
    while len(took_s) < _MIN_PINGS or (len(took_s) < _MAX_PINGS and time.monotonic() < begun_s + _PING_S):
        sent_s = time.monotonic()
        control.sendall(b"p" * MESSAGE_BYTES)
        _take(control, MESSAGE_BYTES)
        took_s.append(time.monotonic() - sent_s)
    control.sendall(b"t" * MESSAGE_BYTES)
    return statistics.median(took_s)


def trickle(control: socket.socket) -> None:
    """Send many messages without haste, so that no queue fills, and take as many of the peer's at the same time."""
    begun_s = time.monotonic()
    num_sent = num_taken = 0
    total = _TRICKLE_MESSAGES * _TRICKLE_BYTES
    message = bytes(_TRICKLE_BYTES)
    last_s = begun_s
    while num_sent < _TRICKLE_MESSAGES or num_taken < total:
        now_s = time.monotonic()
        due = min(_TRICKLE_MESSAGES, int((now_s - begun_s) / _TRICKLE_S * _TRICKLE_MESSAGES) + 1)
        while num_sent < due:
            control.sendall(message)
            num_sent += 1
        readable, _, _ = select.select([control], [], [], _TRICKLE_S / _TRICKLE_MESSAGES)
        if readable and num_taken < total:
            data = control.recv(min(_CHUNK_BYTES, total - num_taken))
            if not data:
                raise ConnectionResetError("the peer has closed the connection")
            num_taken += len(data)
            last_s = now_s
        elif now_s > last_s + SILENCE_S:
            raise TimeoutError("the peer fell silent")


def pour(connection: socket.socket) -> None:
    """Send until the peer has had enough and closes."""
    chunk = bytes(_CHUNK_BYTES)
    try:
        while True:
            connection.sendall(chunk)
    except (ConnectionResetError, BrokenPipeError):
        return


def drain(connection: socket.socket) -> float:
    """Bytes per second of what the peer pours, once the connection has got up to speed; then close it hard, so that
    what is still queued is not sent."""
    buffer = bytearray(_CHUNK_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    warm_s = time.monotonic() + _BULK_WARM_S
    while time.monotonic() < warm_s:
        connection.recv_into(buffer)
    begun_s, num_bytes = time.monotonic(), 0
    while (now_s := time.monotonic()) < begun_s + _BULK_S:
        num_bytes += connection.recv_into(buffer)
    connection.close()
    return num_bytes / (now_s - begun_s)


def _pair(first: float, second: float) -> bytes:
    return struct.pack("=dd", first, second)


def _take_pair(control: socket.socket) -> tuple[float, float]:
    first, second = struct.unpack("=dd", _take(control, 16))
    return first, second


def _take(control: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = control.recv(num_bytes - len(data))
        if not part:
            raise ConnectionResetError("the peer has closed the connection")
        data += part
    return data
