"""Lets peers in that prove that they know the gang's secret, and turns all others away without disturbing anybody."""

import selectors
import socket
import threading
from collections.abc import Callable, Sequence

from engine.errors import ProtocolViolation
from engine.executor.handshake import greet_rank
from engine.executor.sockets import configure, listen

_PROOF_TIMEOUT_S = 10.0
_MAX_STRANGERS = 64
"""Connections that have not proved themselves yet, at most; more are closed at once."""

Admit = Callable[[socket.socket, tuple[int, ...], bytes], bool]
"""Takes over a connection that speaks for these ranks, and sends this answer first; False refuses it."""


class ConnectionDoor:
    """Listens at ``addresses`` until closed. Each newcomer proves itself in a thread of its own, within a bound."""

    def __init__(self, addresses: Sequence[str], secret: str, admit: Admit) -> None:
        self._secret = secret
        self._admit = admit
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closing = False
        names = []
        try:
            for address in addresses:
                listener, name = listen(address)
                self._listeners.append(listener)
                self._selector.register(listener, selectors.EVENT_READ)
                names.append(name)
        except OSError:
            self._free()
            raise
        self.addresses = tuple(names)
        self._thread = threading.Thread(target=self._run, name="channel-door", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._wake_receiver:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    self._accept(key.fileobj)
        finally:
            self._free()

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:
            return  # it hung up before we looked
        if not self._strangers.acquire(blocking=False):
            link.close()
            return
        threading.Thread(target=self._greet, args=(link,), name="channel-greeting", daemon=True).start()

    def _greet(self, link: socket.socket) -> None:
        """A stranger's errors end its own connection and nothing else."""
        admitted = False
        try:
            link.setblocking(True)
            configure(link)
            ranks, answer = greet_rank(link, self._secret, _PROOF_TIMEOUT_S)
            admitted = self._admit(link, ranks, answer)
        except (OSError, ProtocolViolation):
            pass
        finally:
            self._strangers.release()
            if not admitted:
                link.close()

    def close(self) -> None:
        """Stops listening. Connections that were let in are not touched. May be called from any thread."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._wake_sender.send(b"x")

    def _free(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()
