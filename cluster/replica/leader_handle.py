"""A gang's leader, as its supervisor reaches it: a question that it always has to answer, and its side door."""

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.replica.leader_load import LeaderLoad
from cluster.replica.ray_reason import ray_reason
from cluster.replica.side_door import knock
from cluster.replica.silence import SILENT_S, Silence
from engine.executor.channel import ChannelClosed

_log = logging.getLogger(__name__)

NEWS_WAIT_S = 5.0
"""So long a leader may wait for an event before it answers; well below its lease."""
DRAIN_POLL_INTERVAL_S = 0.2
START_TIMEOUT_S = 60.0
"""A process that Ray has just been asked for, on a busy host, may take so long to answer for the first time."""


class LeaderHandle:
    """One life of a leader.

    Args:
        actor: Ray's.
        secret: of its side door.
    """

    def __init__(self, actor: Any, secret: str) -> None:
        self._actor = actor
        self._secret = secret
        self._door = actor.door.remote()
        self._has_begun = False
        self._ask()

    def _ask(self) -> None:
        self.question = self._actor.poll.remote(NEWS_WAIT_S)
        """Ray's reference of the next answer."""
        self._silence = Silence(time.monotonic())

    def take_news(self) -> list[bytes]:
        """The answer, as lines, and the next question at once. The leader always has one to answer, and takes its time
        while there is nothing to tell: asking again and again would cost an idle replica more than all else. Raises
        RayError where the leader is gone."""
        lines: bytes = ray.get(self.question, timeout=0)
        self._ask()
        return lines.splitlines()

    def is_silent(self, now_s: float) -> bool:
        """Whether it hangs; to be asked all the time. One that was not told to begin may not be there yet."""
        return self._has_begun and self._silence.look(now_s) >= SILENT_S

    def begin(self) -> None:
        """Once. Raises as ``call`` does."""
        if not self._has_begun:
            self.call("start")
            self._has_begun, self._silence = True, Silence(time.monotonic())

    def call(self, name: str, argument: bytes = b"") -> bytes:
        """By the side door, whatever else it does. Raises RayError or ChannelClosed where it is gone, or hangs."""
        timeout_s = SILENT_S if self._has_begun else START_TIMEOUT_S
        address = ray.get(self._door, timeout=timeout_s)
        return knock(address, self._secret, name, argument, timeout_s)

    def load(self) -> LeaderLoad | None:
        """None before it serves, and when it is gone."""
        try:
            data = self.call("load")
        except (RayError, ChannelClosed):
            return None
        return LeaderLoad.decode(data) if data else None

    def drain(self, timeout_s: float) -> None:
        """It refuses new requests from now on. Returns when what runs has ended, the time is up, or it is gone."""
        deadline_s = time.monotonic() + timeout_s
        try:
            self.call("drain")
        except (RayError, ChannelClosed):
            return
        while (load := self.load()) is not None and not load.has_drained and time.monotonic() < deadline_s:
            time.sleep(DRAIN_POLL_INTERVAL_S)

    def tell(self, name: str) -> None:
        """As ``call``, but returns at once: what came of it is in the log, and one that hangs shows by its silence."""
        threading.Thread(target=self._tell, args=(name,), name="tell-leader", daemon=True).start()

    def _tell(self, name: str) -> None:
        try:
            self.call(name)
        except (RayError, ChannelClosed) as error:
            _log.warning("the leader was not told to %s: %s", name, ray_reason(error))

    def kill(self) -> None:
        """Whether it still runs or not."""
        ray.kill(self._actor, no_restart=True)
