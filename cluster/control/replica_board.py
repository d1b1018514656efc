"""What the replicas of one Serve application tell the control process, and how each side sees that the other is gone.

The board is in the control process itself and is reached at a side door: no other process or host has to live for it,
and Ray, which may have no control service for a while, carries nothing. A replica says every few seconds that it lives,
with its news. One that has not reached the board for LEASE_S is to end, as no client finds the way to it; one that was
not heard for GIVEN_UP_S is taken for ended.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass

import msgspec

from cluster.replica.events import Event, ReplicaEnded, decode_event, encode_event
from cluster.replica.side_door import SideDoor, knock
from engine.errors import ProtocolViolation
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import new_secret

_log = logging.getLogger(__name__)

LEASE_S = 30.0
GIVEN_UP_S = 60.0
"""By then the replica knows that it is cut off: the lease, and the call that was under way when that ran out."""
_NUM_RENEWALS = 6
_NUM_RETRIES = 30
"""In a lease."""
_CALL_TIMEOUT_S = 10.0


class _Report(msgspec.Struct, frozen=True, array_like=True):
    """Encoded events. ``first``: how many the replica had told before, as far as it knows."""

    replica: str
    first: int
    lines: list[bytes]


@dataclass
class _Known:
    """A replica that has reported. ``has_ended``: by its own word."""

    heard_s: float
    num_lines: int = 0
    has_ended: bool = False
    is_given_up: bool = False


class ReplicaBoard:
    """The control process's side.

    Args:
        host: this host's address, as the replicas reach it.
        given_up_s: a replica that has reported once and then nothing for so long has ended.
    """

    def __init__(self, host: str, given_up_s: float = GIVEN_UP_S) -> None:
        self.secret = new_secret()
        self._given_up_s = given_up_s
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._num_names = 0
        self._replicas: dict[str, _Known] = {}
        self._door = SideDoor(f"tcp:{host}:0", self.secret, {"name": self._name, "report": self._report})

    @property
    def address(self) -> str:
        return self._door.address

    def take(self) -> list[Event]:
        """What was told since the last call, each event once and in its replica's order."""
        with self._lock:
            self._give_up_silent()
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        self._door.close()

    def _give_up_silent(self) -> None:
        since_s = time.monotonic() - self._given_up_s
        for name, known in self._replicas.items():
            if known.heard_s < since_s and not known.has_ended and not known.is_given_up:
                _log.warning("replica %s was not heard for %g s, and is given up", name, self._given_up_s)
                known.is_given_up = True
                self._events.append(ReplicaEnded(name))

    def _name(self, _: bytes) -> bytes:
        """Never given twice: a replacement is another replica."""
        with self._lock:
            self._num_names += 1
            return f"r{self._num_names - 1}".encode()

    def _report(self, encoded: bytes) -> bytes:
        """Raises ProtocolViolation for a replica that was given up: it must not come back."""
        report = msgspec.msgpack.decode(encoded, type=_Report)
        now_s = time.monotonic()
        with self._lock:
            known = self._replicas.setdefault(report.replica, _Known(now_s))
            if known.is_given_up:
                raise ProtocolViolation(f"replica {report.replica} was given up")
            known.heard_s = now_s
            # It tells again what it got no answer to, though we may have heard it.
            for line in report.lines[known.num_lines - report.first :]:
                event = decode_event(line)
                known.num_lines += 1
                known.has_ended |= isinstance(event, ReplicaEnded)
                self._events.append(event)
        return b""


class BoardLink:
    """A replica's side. Has a thread of its own: whatever else the replica does, it is heard.

    Args:
        address, secret: the board's.
        lease_s: for how long the board may be silent.

    Attributes:
        name: the replica's, given by the board.

    Raises ChannelClosed at construction where the board does not answer.
    """

    def __init__(self, address: str, secret: str, lease_s: float = LEASE_S) -> None:
        self._address = address
        self._secret = secret
        self._lease_s = lease_s
        self._news: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        """None: nothing follows."""
        self._cut = threading.Event()
        self.name = knock(address, secret, "name", b"", _CALL_TIMEOUT_S).decode()
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)
        self._thread.start()

    @property
    def is_cut(self) -> bool:
        """Whether the board was silent for longer than the lease. It stays so: the board may have given us up."""
        return self._cut.is_set()

    def post(self, event: Event) -> None:
        """Does not wait. Events arrive in order, each once."""
        self._news.put(event)

    def close(self) -> None:
        """Returns when all has arrived, or the lease has run out."""
        self._news.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._tell_until_closed()
        except ChannelClosed as error:
            _log.warning("replica %s has not reached its board for %g s: %s", self.name, self._lease_s, error)
            self._cut.set()

    def _tell_until_closed(self) -> None:
        """Raises ChannelClosed when the lease has run out."""
        heard_s, wait_s, num_told = time.monotonic(), 0.0, 0
        lines: list[bytes] = []
        is_closing = False
        while not is_closing or lines:
            is_closing |= self._collect(lines, wait_s)
            try:
                self._tell(_Report(self.name, num_told, lines))
            except ChannelClosed:
                if time.monotonic() > heard_s + self._lease_s:
                    raise
                wait_s = self._lease_s / _NUM_RETRIES
            else:
                heard_s, wait_s = time.monotonic(), self._lease_s / _NUM_RENEWALS
                num_told += len(lines)
                lines = []

    def _tell(self, report: _Report) -> None:
        knock(self._address, self._secret, "report", msgspec.msgpack.encode(report), _CALL_TIMEOUT_S)

    def _collect(self, lines: list[bytes], wait_s: float) -> bool:
        """Append what is there, and wait for the first. Returns whether nothing follows."""
        try:
            event = self._news.get(timeout=wait_s)
            while event is not None:
                lines.append(encode_event(event))
                event = self._news.get_nowait()
        except queue.Empty:
            return False
        return True
