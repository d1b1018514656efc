"""How a rank and its leader make sure of each other before the first frame: both prove to know the gang's secret.

Challenge and response by HMAC-SHA256 (RFC 2104) over both sides' nonces; the secret itself never travels.

    leader → rank   magic, nonce (32 bytes)
    rank → leader   magic, nonce (32), number of ranks it speaks for and those ranks (16 bits each), proof (32)
    leader → rank   proof (32), and on a Unix socket the descriptors of the plan ring and the progress area
"""

import hmac
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

from engine.errors import ProtocolViolation

MAGIC = b"REMUDA-1"
MAX_RANKS = 4096
_NONCE_BYTES = 32
_PROOF_BYTES = 32


def new_secret() -> str:
    """A gang's secret, as text for configurations."""
    return os.urandom(32).hex()


def greet_rank(connection: socket.socket, secret: str, timeout_s: float) -> tuple[tuple[int, ...], bytes]:
    """The leader's part up to its answer: the ranks that the peer speaks for, and the proof to answer with.

    Raises ProtocolViolation where the peer is not one of ours, OSError or TimeoutError where it is gone or slow.
    """
    deadline = time.monotonic() + timeout_s
    nonce = os.urandom(_NONCE_BYTES)
    connection.sendall(MAGIC + nonce)
    head = _receive_exactly(connection, len(MAGIC) + _NONCE_BYTES + 2, deadline)
    if not head.startswith(MAGIC):
        raise ProtocolViolation("the peer does not speak this protocol")
    peer_nonce = head[len(MAGIC) : -2]
    (num_ranks,) = struct.unpack("<H", head[-2:])
    if not 0 < num_ranks <= MAX_RANKS:
        raise ProtocolViolation(f"the peer speaks for {num_ranks} ranks")
    rank_bytes = _receive_exactly(connection, 2 * num_ranks, deadline)
    proof = _receive_exactly(connection, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _prove(secret, b"rank", nonce, peer_nonce, rank_bytes)):
        raise ProtocolViolation("the peer does not know the gang's secret")
    return struct.unpack(f"<{num_ranks}H", rank_bytes), _prove(secret, b"leader", peer_nonce, nonce, rank_bytes)


def greet_leader(
    connection: socket.socket, secret: str, ranks: Sequence[int], timeout_s: float
) -> tuple[int, int] | None:
    """A rank's or relay's part; returns the descriptors of the plan ring and the progress area where there are such.

    Raises ProtocolViolation where the peer does not prove itself, OSError or TimeoutError where it is gone or slow.
    """
    deadline = time.monotonic() + timeout_s
    greeting = _receive_exactly(connection, len(MAGIC) + _NONCE_BYTES, deadline)
    if not greeting.startswith(MAGIC):
        raise ProtocolViolation("the leader does not speak this protocol; is another build running there?")
    peer_nonce = greeting[len(MAGIC) :]
    nonce = os.urandom(_NONCE_BYTES)
    rank_bytes = struct.pack(f"<{len(ranks)}H", *ranks)
    proof = _prove(secret, b"rank", peer_nonce, nonce, rank_bytes)
    connection.sendall(MAGIC + nonce + struct.pack("<H", len(ranks)) + rank_bytes + proof)
    if connection.family == socket.AF_UNIX:
        _wait_readable(connection, deadline)
        answer, descriptors, _, _ = socket.recv_fds(connection, _PROOF_BYTES, 2)
    else:
        answer, descriptors = _receive_exactly(connection, _PROOF_BYTES, deadline), []
    if not hmac.compare_digest(answer, _prove(secret, b"leader", nonce, peer_nonce, rank_bytes)):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ProtocolViolation("the leader refused this rank: another secret, or the rank is there already")
    return (descriptors[0], descriptors[1]) if len(descriptors) == 2 else None


def _prove(secret: str, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret.encode(), b"|".join((role, *parts)), "sha256")


def _receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        _wait_readable(connection, deadline)
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise ConnectionError("the peer closed the connection before it proved itself")
        data += part
    return data


def _wait_readable(connection: socket.socket, deadline: float) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("the peer did not prove itself in time")
