"""Ray's control service (GCS), as a supervisor needs it: to learn which hosts live, and to start and end processes.

Ray's calls to it wait for it for as long as it takes, which is long (``_PATIENT`` in cluster/control/ray_settings.py),
since what runs already needs it for nothing. Nobody here waits for ever.
"""

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import StartFailed

_log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""One that keeps its state on disk is started again within so long (docs/failover.md)."""
_CONNECT_TIMEOUT_S = 1.0
_LOOK_INTERVAL_S = 5.0
T = TypeVar("T")


class ControlServiceSilent(StartFailed):
    """It did not answer in time."""


class ControlService:
    """``address``: host:port of the Ray that this process is a driver of."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._answers = True
        self._looked_s = 0.0

    def answers(self) -> bool:
        """Whether anything listens there."""
        with contextlib.suppress(OSError):
            socket.create_connection((self._host, self._port), _CONNECT_TIMEOUT_S).close()
            return True
        return False

    def look(self, now_s: float) -> None:
        """Tell in the log when it falls silent, and when it answers again. To be called now and then."""
        if now_s < self._looked_s + _LOOK_INTERVAL_S:
            return
        self._looked_s = now_s
        before, self._answers = self._answers, self.answers()
        if before and not self._answers:
            _log.warning(
                "Ray's control service at %s:%d does not answer: requests run on, but no new process can replace one "
                "that is lost now",
                self._host,
                self._port,
            )
        elif self._answers and not before:
            _log.warning("Ray's control service answers again")

    def ask(self, call: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
        """What the call returns or raises, or ControlServiceSilent. A call that is given up may still have its effect:
        processes that nobody knows end by their leases."""
        answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:  # noqa: BLE001  (raised below)
                answers.put((None, error))

        threading.Thread(target=run, name="control-service", daemon=True).start()
        try:
            value, error = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ControlServiceSilent(
                f"Ray's control service has not answered for {timeout_s:g} s, so that no process can be started"
            ) from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # there is one where there is no error
