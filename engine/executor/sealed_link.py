"""Messages between two ranks that prove to know the gang's secret, each sealed (AES-256-GCM, RFC 5116) with a key made
of it, so that nobody on the way reads or changes one.

Greeting: engine.executor.handshake, with a secret of its own. Then messages: a nonce of 12 bytes, the sealed bytes, a
tag of 16; before those whose length the other side cannot know, the number of all that as 32 bits. What a message is
(its label) is sealed with it and does not travel: one in another's place is refused.
"""

import hmac
import os
import socket
import struct
import time

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.errors import ProtocolViolation

_NONCE_BYTES = 12
_TAG_BYTES = 16
_LENGTH = struct.Struct("<I")


def greeting_secret(secret: str, purpose: str) -> str:
    """For the greeting of links with this ``purpose``: who listens for them must not pass for the leader."""
    return hmac.digest(secret.encode(), f"greeting {purpose}".encode(), "sha256").hex()


class SealedLink:
    """One side's end. Both methods raise OSError where the other side is gone, and TimeoutError where it is slow.

    Args:
        link: blocking; greeted.
        timeout_s: of every single wait for the other side. ``deadline_s``, on time.monotonic's clock, ends them all.
    """

    def __init__(self, link: socket.socket, secret: str, purpose: str, timeout_s: float) -> None:
        self._link = link
        self._cipher = AESGCM(hmac.digest(secret.encode(), f"sealing {purpose}".encode(), "sha256"))
        self._timeout_s = timeout_s
        self.deadline_s: float | None = None
        self._buffer = bytearray()

    def send(self, label: bytes, data: bytes | memoryview, *, with_length: bool = False) -> None:
        """``with_length``: for a receiver that does not know it."""
        self._wait_at_most()
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, data, label)
        head = _LENGTH.pack(len(sealed) + _NONCE_BYTES) if with_length else b""
        self._link.sendall(head + nonce)
        self._link.sendall(sealed)

    def receive(self, label: bytes, num_bytes: int) -> bytes:
        """A message of this length. Raises ProtocolViolation where it is not this one, or was not sealed by one of
        ours."""
        received = self._read(_NONCE_BYTES + num_bytes + _TAG_BYTES)
        try:
            return self._cipher.decrypt(received[:_NONCE_BYTES], received[_NONCE_BYTES:], label)
        except InvalidTag:
            raise ProtocolViolation("a message that was not sealed by this gang, or is another than was due") from None

    def receive_any(self, label: bytes, most_bytes: int) -> bytes:
        """A message that says its length. Raises ProtocolViolation as ``receive``, and where it is too long."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        num_bytes = length - _NONCE_BYTES - _TAG_BYTES
        if not 0 <= num_bytes <= most_bytes:
            raise ProtocolViolation(f"a message of {num_bytes} bytes; at most {most_bytes} are allowed")
        return self.receive(label, num_bytes)

    def _read(self, num_bytes: int) -> memoryview:
        """Good until the next call."""
        if num_bytes > len(self._buffer):
            self._buffer = bytearray(num_bytes)
        view = memoryview(self._buffer)[:num_bytes]
        done = 0
        while done < num_bytes:
            self._wait_at_most()
            received = self._link.recv_into(view[done:])
            if received == 0:
                raise ConnectionResetError("the other rank closed the connection")
            done += received
        return view

    def _wait_at_most(self) -> None:
        timeout_s = self._timeout_s
        if self.deadline_s is not None:
            timeout_s = min(timeout_s, self.deadline_s - time.monotonic())
            if timeout_s <= 0:
                raise TimeoutError("the other rank is too slow")
        self._link.settimeout(timeout_s)
