"""Sockets of the step channel: addresses, options, and sending within a bound of time.

An address is ``unix:@NAME`` (Linux's abstract namespace: no file, gone with its owner) or ``tcp:HOST:PORT``.
"""

import select
import socket
import time
from collections.abc import Callable

SEND_TIMEOUT_S = 30.0
"""A peer that reads nothing for so long counts as lost."""
_RETRY_S = 0.05
_SILENCE_S = 15
"""A TCP peer that acknowledges nothing for so long counts as lost."""


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket, and its address with the port that was chosen where ``address`` says port 0."""
    family, target = _parse(address)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(target)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    if family == socket.AF_UNIX:
        return listener, address
    host, port = listener.getsockname()[:2]
    return listener, f"tcp:{host}:{port}"


def connect_when_open(address: str, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> socket.socket:
    """As ``connect``, for a peer that may not be listening yet: a relay and the ranks behind it start together."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return connect(address, timeout_s)
        except ConnectionRefusedError:
            if time.monotonic() + _RETRY_S > deadline or give_up():
                raise
            time.sleep(_RETRY_S)


def connect(address: str, timeout_s: float) -> socket.socket:
    """A connected, blocking socket."""
    family, target = _parse(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(target)
        connection.settimeout(None)
        configure(connection)
    except OSError:
        connection.close()
        raise
    return connection


def configure(connection: socket.socket) -> None:
    """No delay for small messages, and no waiting for ever for a silent host."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000)


def send_all(connection: socket.socket, data: bytes, timeout_s: float = SEND_TIMEOUT_S) -> None:
    """Sends everything, on blocking and non-blocking sockets alike. Raises OSError or TimeoutError."""
    sent = _try_send(connection, data)
    if sent == len(data):
        return
    view = memoryview(data)
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    while sent < len(data):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"the peer read nothing for {timeout_s} s")
        sent += _try_send(connection, view[sent:])


def _try_send(connection: socket.socket, data: bytes | memoryview) -> int:
    try:
        return connection.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0


def _parse(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest.startswith("@"):
        return socket.AF_UNIX, "\0" + rest[1:]
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return family, (host, int(port))
    raise ValueError(f"{address!r} is no channel address; it is unix:@NAME or tcp:HOST:PORT")
