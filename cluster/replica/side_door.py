"""Calls to a Ray actor whose only thread is in a call already.

An actor that takes several calls at a time is woken by Ray a hundred times a second, all its life, to look for signals.
One with a single thread, which is in a long call, is not; what must reach it meanwhile comes in by this door. Each call
is a connection of its own, on which both sides prove to know a secret (engine.executor.handshake). What follows is
sealed with a key made of it (Fernet), for a formation holds the gang's own secret.

    caller → actor   number of bytes (32 bits), sealed [name, argument]
    actor → caller   number of bytes (32 bits), sealed [error or nothing, answer]
"""

import base64
import contextlib
import hmac
import socket
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from engine.errors import ProtocolViolation
from engine.executor.channel import ChannelClosed
from engine.executor.connection_door import ConnectionDoor
from engine.executor.handshake import greet_leader
from engine.executor.sockets import connect

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

_REQUEST_TIMEOUT_S = 10.0
_MAX_BYTES = 1 << 24
_HEAD = struct.Struct("<I")


class SideDoor:
    """Args:
    address: as engine.executor.sockets has it.
    secret: that callers must know.
    calls: by name; each takes and returns bytes, and is called from a thread of its own.
    """

    def __init__(self, address: str, secret: str, calls: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._calls = calls
        self._secret = secret
        self._door = ConnectionDoor([address], secret, self._answer)

    @property
    def address(self) -> str:
        """With the port that was chosen where the given one had none."""
        return self._door.addresses[0]

    def close(self) -> None:
        """Calls that are under way still end."""
        self._door.close()

    def _answer(self, link: socket.socket, ranks: tuple[int, ...], proof: bytes) -> bool:
        with link:
            link.sendall(proof)
            link.settimeout(_REQUEST_TIMEOUT_S)
            cipher = _cipher(self._secret)
            name, argument = msgspec.msgpack.decode(_receive(link, cipher), type=tuple[str, bytes])
            answer: tuple[str | None, bytes]
            try:
                answer = None, self._calls[name](argument)
            except Exception as error:  # noqa: BLE001  (whatever it was, the caller is told)
                answer = f"{type(error).__name__}: {error}", b""
            # A caller that did not wait so long has noted that it got no answer.
            with contextlib.suppress(OSError):
                _send(link, cipher, msgspec.msgpack.encode(answer))
        return True


def knock(address: str, secret: str, name: str, argument: bytes, timeout_s: float) -> bytes:
    """Calls ``name``. Raises ChannelClosed where nobody answers in time, or the call raised."""
    try:
        with connect(address, timeout_s) as link:
            greet_leader(link, secret, [0], timeout_s)
            link.settimeout(timeout_s)
            cipher = _cipher(secret)
            _send(link, cipher, msgspec.msgpack.encode((name, argument)))
            error, answer = msgspec.msgpack.decode(_receive(link, cipher), type=tuple[str | None, bytes])
    except (OSError, ProtocolViolation) as failure:
        raise ChannelClosed(f"{address} did not answer {name}: {failure}") from failure
    if error is not None:
        raise ChannelClosed(f"{name} failed: {error}")
    return answer


def _cipher(secret: str) -> "Fernet":
    from cryptography.fernet import Fernet  # no process needs it to start

    return Fernet(base64.urlsafe_b64encode(hmac.digest(secret.encode(), b"side door", "sha256")))


def _send(link: socket.socket, cipher: "Fernet", data: bytes) -> None:
    sealed = cipher.encrypt(data)
    link.sendall(_HEAD.pack(len(sealed)) + sealed)


def _receive(link: socket.socket, cipher: "Fernet") -> bytes:
    """Raises ProtocolViolation where it was not sealed with the same key."""
    from cryptography.fernet import InvalidToken

    (num_bytes,) = _HEAD.unpack(_exactly(link, _HEAD.size))
    if num_bytes > _MAX_BYTES:
        raise ProtocolViolation(f"a message of {num_bytes} bytes; at most {_MAX_BYTES} are allowed")
    try:
        return cipher.decrypt(_exactly(link, num_bytes))
    except InvalidToken as error:
        raise ProtocolViolation("a message that was not sealed with our secret") from error


def _exactly(link: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = link.recv(num_bytes - len(data))
        if not part:
            raise ConnectionError("the connection ended before the message did")
        data += part
    return data
