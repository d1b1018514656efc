"""A rank that has its weights gives them to those that load, while it waits for them.

    newcomer → rank   the keys that it lacks (engine.weights.shared_pieces)
    rank → newcomer   which of them it holds, then these pieces' bytes, block by block

Nothing is read from disk for it, and no more is copied at a time than a block for each newcomer.
"""

import contextlib
import hashlib
import logging
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec

from engine.errors import ProtocolViolation
from engine.executor.connection_door import ConnectionDoor
from engine.executor.sealed_link import SealedLink, greeting_secret
from engine.weights.shared_pieces import Shard, blocks_of, bytes_of

_log = logging.getLogger(__name__)

PURPOSE = "shard"
BLOCK_BYTES = 4 * 2**20
MAX_LIST_BYTES = 16 * 2**20
"""Of the newcomer's keys."""
WAIT_TIMEOUT_S = 10.0
WANTED = b"wanted"
_NUMBER = struct.Struct("<Q")


def held_label(wanted: bytes) -> bytes:
    """Of the answer to this list."""
    return b"held" + hashlib.blake2b(wanted, digest_size=16).digest()


def block_label(key: bytes, number: int) -> bytes:
    """Of the piece's block of this number."""
    return key + _NUMBER.pack(number)


@contextlib.contextmanager
def shard_served(host: str, secret: str, shard: Shard | None) -> Iterator[str]:
    """Meanwhile newcomers are given what ``shard`` holds. Yields the address to ask at, on the interface of ``host``;
    "" where there is no shard, or nobody can listen there: then they read from disk."""
    server = None
    try:
        server = None if shard is None else ShardServer(f"tcp:{host}:0", secret, shard)
    except OSError as error:
        _log.warning("cannot give weights to other ranks at %s: %s", host, error)
    try:
        yield "" if server is None else server.address
    finally:
        if server is not None:
            server.close()


class ShardServer:
    """Listens at ``address`` (engine.executor.sockets) until it is closed.

    Args:
        secret: the gang's, of this formation.
        shard: must not change before ``close``.
    """

    def __init__(self, address: str, secret: str, shard: Shard) -> None:
        self._secret = secret
        self._shard = shard
        self._changed = threading.Condition()
        self._links: set[socket.socket] = set()
        self._is_closed = False
        self._door = ConnectionDoor([address], greeting_secret(secret, PURPOSE), self._serve)

    @property
    def address(self) -> str:
        """With the port that was chosen."""
        return self._door.addresses[0]

    def close(self) -> None:
        """Returns when nobody reads the shard any more."""
        self._door.close()
        with self._changed:
            self._is_closed = True
            for link in self._links:
                with contextlib.suppress(OSError):  # the newcomer was first
                    link.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._links)

    def _serve(self, link: socket.socket, ranks: tuple[int, ...], proof: bytes) -> bool:
        """In a thread of the connection's own."""
        with self._changed:
            if self._is_closed:
                return False
            self._links.add(link)
        try:
            link.settimeout(WAIT_TIMEOUT_S)
            link.sendall(proof)
            self._give(SealedLink(link, self._secret, PURPOSE, WAIT_TIMEOUT_S))
        except (OSError, ProtocolViolation, msgspec.DecodeError) as error:
            if not self._is_closed:
                _log.warning("rank %d did not take its weights here: %s", ranks[0], error)
        finally:
            with self._changed:
                link.close()
                self._links.discard(link)
                self._changed.notify_all()
        return True

    def _give(self, link: SealedLink) -> None:
        question = link.receive_any(WANTED, MAX_LIST_BYTES)
        wanted = msgspec.msgpack.decode(question, type=list[bytes])
        held = [(index, tensors) for index, key in enumerate(wanted) if (tensors := self._shard.get(key)) is not None]
        link.send(held_label(question), msgspec.msgpack.encode([index for index, _ in held]), with_length=True)
        for index, tensors in held:
            for number, block in enumerate(blocks_of(tensors, BLOCK_BYTES)):
                link.send(block_label(wanted[index], number), bytes_of(block))
