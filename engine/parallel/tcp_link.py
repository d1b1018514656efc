"""Hidden states between CPU ranks of two hosts: one TCP connection for each pair of neighbouring ranks.

gloo moves no byte before the receiver has asked for it, which costs a message its round trip; here what is sent flows
at once, and threads of both sides move it while the ranks compute.
"""

import contextlib
import hmac
import queue
import secrets
import socket
import struct
import threading
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import ProtocolViolation, RankFailure
from engine.progress import AxisMarks, Operation

_MAX_MESSAGES = 8
"""That wait on each side; then the sender waits too."""
_TOKEN_BYTES = 32
_LENGTH = struct.Struct("<q")

_Message = bytes | bytearray | OSError | None
"""What is sent or was received, or why nothing can be; None: the link is gone."""


class _TcpEnd:
    """What both ends have in common. The connection is closed with the object."""

    def __init__(self, connection: socket.socket, peer: int, timeout_s: float, marks: AxisMarks) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
        self._messages: queue.Queue[_Message] = queue.Queue(_MAX_MESSAGES)
        self._peer = peer
        self._marks = marks
        self._timeout_s = timeout_s
        self._end = weakref.finalize(self, _close, connection, self._messages)

    def abort(self) -> None:
        """See Endable."""
        self._end()

    def close(self) -> None:
        self._end()

    def _lost(self, error: OSError) -> RankFailure:
        return RankFailure(
            f"the connection to rank {self._peer} of the neighbouring stage was lost: {error}", self._peer
        )

    def _silent(self, complaint: str) -> RankFailure:
        return RankFailure(
            f"rank {self._peer} of the neighbouring stage {complaint} for {self._timeout_s:g} s", self._peer
        )


class TcpSender(_TcpEnd):
    """See StageSender. ``peer``: the receiver's global rank."""

    def __init__(self, connection: socket.socket, peer: int, timeout_s: float, marks: AxisMarks) -> None:
        super().__init__(connection, peer, timeout_s, marks)
        self._failure: list[OSError] = []
        arguments = (connection, self._messages, self._failure)
        threading.Thread(target=_send_all, args=arguments, name=f"to-rank-{peer}", daemon=True).start()

    @classmethod
    def connect(cls, store: dist.Store, peer: int, timeout_s: float, marks: AxisMarks) -> "TcpSender":
        """To the peer that listens under ``store``, which is this pair's. Raises RuntimeError where none does."""
        store.wait(["listener"], timedelta(seconds=timeout_s))
        host, port, token = store.get("listener").decode().split()
        try:
            connection = socket.create_connection((host, int(port)), timeout_s)
            connection.sendall(token.encode())
        except OSError as error:
            raise RuntimeError(f"rank {peer} at {host}:{port} cannot be reached: {error}") from error
        return cls(connection, peer, timeout_s, marks)

    def send(self, hidden: torch.Tensor) -> None:
        data = hidden.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        self._marks.wait(Operation.SEND, for_next=True)
        try:
            self._messages.put(data, timeout=self._timeout_s)
        except queue.Full:
            raise self._silent("took nothing") from None
        self._marks.enter(Operation.SEND)
        self._marks.resume()
        if self._failure:
            raise self._lost(self._failure[0])
        if not self._end.alive:
            raise self._lost(ConnectionAbortedError("the formation is over"))


class TcpReceiver(_TcpEnd):
    """See StageReceiver. ``peer``: the sender's global rank."""

    def __init__(self, connection: socket.socket, peer: int, timeout_s: float, marks: AxisMarks) -> None:
        super().__init__(connection, peer, timeout_s, marks)
        arguments = (connection, self._messages)
        threading.Thread(target=_receive_all, args=arguments, name=f"from-rank-{peer}", daemon=True).start()

    @classmethod
    def accept(cls, store: dist.Store, address: str, peer: int, timeout_s: float, marks: AxisMarks) -> "TcpReceiver":
        """Listens on ``address`` for the peer, and says so in ``store``, which is this pair's. Raises RuntimeError
        where it does not come in time."""
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as listener:
            listener.settimeout(timeout_s)
            store.set("listener", f"{address} {listener.getsockname()[1]} {token}")
            try:
                while True:
                    connection, _ = listener.accept()
                    connection.settimeout(timeout_s)
                    if hmac.compare_digest(_read(connection, _TOKEN_BYTES), token.encode()):
                        return cls(connection, peer, timeout_s, marks)
                    connection.close()
            except OSError as error:
                raise RuntimeError(f"rank {peer} did not connect to {address}: {error}") from error

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        self._marks.wait(Operation.RECEIVE, for_next=True)
        try:
            message = self._messages.get(timeout=self._timeout_s)
        except queue.Empty:
            raise self._silent("sent nothing") from None
        self._marks.enter(Operation.RECEIVE)
        self._marks.resume()
        if isinstance(message, OSError):
            self._messages.put(message)
            raise self._lost(message)
        if message is None:
            self._messages.put(None)
            raise self._lost(ConnectionAbortedError("the formation is over"))
        hidden = torch.frombuffer(message, dtype=dtype)
        if hidden.numel() != shape[0] * shape[1]:
            raise ProtocolViolation(f"rank {self._peer} sent {hidden.numel()} numbers; {shape} are due")
        return hidden.view(shape)


# The threads know the connection and the queue, not the link: so the link can go, and the connection with it.


def _send_all(connection: socket.socket, messages: "queue.Queue[_Message]", failure: list[OSError]) -> None:
    try:
        while isinstance(message := messages.get(), bytes):
            connection.sendall(_LENGTH.pack(len(message)) + message)
    except OSError as error:
        failure.append(error)
        with contextlib.suppress(queue.Empty):  # somebody may wait for room
            messages.get_nowait()


def _receive_all(connection: socket.socket, messages: "queue.Queue[_Message]") -> None:
    try:
        while True:
            (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
            messages.put(_read(connection, length))
    except OSError as error:
        messages.put(error)


def _read(connection: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    done = 0
    while done < num_bytes:
        received = connection.recv_into(view[done:])
        if received == 0:
            raise ConnectionResetError("closed by the other side")
        done += received
    return data


def _close(connection: socket.socket, messages: "queue.Queue[_Message]") -> None:
    with contextlib.suppress(OSError):  # the other side may have closed it before
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    # A thread may wait for a message, or for room.
    with contextlib.suppress(queue.Empty):
        while True:
            messages.get_nowait()
    messages.put(None)
