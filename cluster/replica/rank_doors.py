"""The side doors of a gang's ranks: there they hear what comes next, and show that they still run.

Every call has a thread of its own, for one that does not answer must not hold up the others.
"""

import logging
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.replica.ray_reason import ray_reason
from cluster.replica.side_door import knock
from engine.executor.channel import ChannelClosed

_log = logging.getLogger(__name__)

TELL_TIMEOUT_S = 60.0
SILENT_S = 30.0
"""A process that imports what a rank needs, on a busy host, may take seconds to answer."""
ASK_INTERVAL_S = 5.0


@dataclass
class _Door:
    """``reference``: Ray's, of its address. ``asked_s``: when it was asked last."""

    reference: Any
    asked_s: float = -math.inf
    is_asked: bool = False
    is_silent: bool = False


class RankDoors:
    """Args:
    secret: of all of them.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._doors: dict[int, _Door] = {}

    @property
    def ranks(self) -> set[int]:
        """That have been started."""
        return set(self._doors)

    def add(self, rank: int, reference: Any) -> None:
        """Of the rank's new process. ``reference``: Ray's, of the door's address."""
        self._doors[rank] = _Door(reference)

    def tell(self, rank: int, name: str, argument: bytes = b"") -> None:
        """Returns at once. Whether a rank heard of a formation shows by its joining."""
        threading.Thread(target=self._tell, args=(self._doors[rank], name, argument), daemon=True).start()

    def _tell(self, door: _Door, name: str, argument: bytes) -> None:
        try:
            knock(ray.get(door.reference, timeout=TELL_TIMEOUT_S), self._secret, name, argument, TELL_TIMEOUT_S)
        except (RayError, ChannelClosed) as error:
            _log.warning("a rank was not told to %s: %s", name, ray_reason(error))

    def silent(self, ranks: Iterable[int], now_s: float) -> list[int]:
        """Which of them have not answered for SILENT_S; asks them now and then. A rank whose process has no door yet is
        not asked: only Ray knows where that is, and what has ended is Ray's to tell."""
        asked = [(rank, self._doors[rank]) for rank in ranks]
        for _, door in asked:
            is_due = not door.is_asked and now_s >= door.asked_s + ASK_INTERVAL_S
            if is_due and ray.wait([door.reference], timeout=0)[0]:
                door.is_asked, door.asked_s = True, now_s
                threading.Thread(target=self._ask, args=(door,), name="ask-rank", daemon=True).start()
        return [rank for rank, door in asked if door.is_silent]

    def _ask(self, door: _Door) -> None:
        began_s = time.monotonic()
        try:
            knock(ray.get(door.reference), self._secret, "stay", b"", SILENT_S)
        except (RayError, ChannelClosed):
            door.is_silent = time.monotonic() - began_s > 0.9 * SILENT_S
        door.is_asked = False
