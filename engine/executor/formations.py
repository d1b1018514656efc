"""Where whoever supervises a rank leaves what comes after the present formation of the gang."""

import threading
import time
from collections.abc import Callable

from engine.errors import ProtocolViolation
from engine.executor.worker_config import WorkerConfig


class Formations:
    """The formations of one rank's life, one after the other. Any thread may ``put``; the rank's own thread takes.

    Args:
        lease_s: a rank that is left without a formation, or word that one will come, for so long belongs to nobody,
            and ends.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._changed = threading.Condition()
        self._epoch = -1
        self._next: WorkerConfig | None = None
        self._interrupt: Callable[[], None] | None = None
        self._is_closed = False
        self._heard_s = 0.0

    def put(self, config: WorkerConfig) -> None:
        """The gang forms anew; the present formation is over. Of several that wait the last counts.

        Raises ProtocolViolation where the epoch is not later than all before: somebody is late.
        """
        with self._changed:
            if config.epoch <= self._epoch:
                raise ProtocolViolation(f"epoch {config.epoch} comes after epoch {self._epoch}")
            self._epoch, self._next = config.epoch, config
            interrupt = self._interrupt
            self._changed.notify_all()
        if interrupt is not None:
            interrupt()

    def renew(self) -> None:
        """One will come, later: whoever forms the gang waits for something itself."""
        with self._changed:
            self._heard_s = time.monotonic()

    def close(self) -> None:
        """No more will come: a rank without a formation ends at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def take(self) -> WorkerConfig | None:
        """Waits for the next one. None: the lease ran out, or no more will come."""
        with self._changed:
            self._interrupt = None
            self._heard_s = time.monotonic()
            while self._next is None and not self._is_closed:
                left_s = self._heard_s + self._lease_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            taken, self._next = self._next, None
            return taken

    @property
    def has_next(self) -> bool:
        """Whether the present formation is over."""
        return self._next is not None

    def interrupt_with(self, interrupt: Callable[[], None]) -> None:
        """Has the present formation ended by ``interrupt``, from another thread, when the next one comes."""
        with self._changed:
            self._interrupt = interrupt
            is_late = self._next is not None
        if is_late:
            interrupt()
