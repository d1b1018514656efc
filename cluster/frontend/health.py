"""Alive and ready, by what the replicas do: an HTTP answer alone proves neither."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.frontend.clock import Clock
from cluster.types import ReplicaInfo, ReplicaState
from engine.executor.watchdog import RankState

_MARGIN_S = 5.0
_HANGING = frozenset((RankState.STALLED.value, RankState.DEAD.value))


class Progress(enum.StrEnum):
    """What a replica is about."""

    IDLE = "idle"
    """No work."""
    BUSY = "busy"
    """It has work and its steps go on."""
    STALLED = "stalled"
    """It has work, and no step has ended for too long."""
    DOWN = "down"
    """Not serving: starting, or failed."""


@dataclass
class _Mark:
    """A replica's last observed step, and when it was first seen (or last seen without work)."""

    steps: tuple[int, int]
    since_s: float


class Probed(Protocol):
    """What probes ask: whether it is alive, with what its parts do, and whether it is ready, with a reason."""

    def live(self) -> tuple[bool, Mapping[str, str]]: ...

    def ready(self) -> tuple[bool, str]: ...


class Health:
    """Args:
    replicas: what they last said of themselves.
    is_draining: whether this front end takes new requests.
    clock: for how long nothing moved.
    stall_s: a step takes less than this, with a wide margin; for replicas that do not say so themselves.
    """

    def __init__(
        self,
        replicas: Callable[[], Sequence[ReplicaInfo]],
        is_draining: Callable[[], bool],
        clock: Clock,
        stall_s: float,
    ) -> None:
        self._replicas = replicas
        self._is_draining = is_draining
        self._clock = clock
        self._stall_s = stall_s
        self._marks: dict[str, _Mark] = {}

    def observe(self) -> dict[str, Progress]:
        """Each replica's progress now. To be called regularly: what is between two calls is not seen."""
        now_s = self._clock.now_s()
        infos = self._replicas()
        for gone in self._marks.keys() - {info.id for info in infos}:
            del self._marks[gone]
        return {info.id: self._observe_one(info, now_s) for info in infos}

    def _observe_one(self, info: ReplicaInfo, now_s: float) -> Progress:
        steps = (info.incarnation, info.num_steps)
        has_work = info.num_running + info.num_waiting > 0
        mark = self._marks.get(info.id)
        if mark is None or mark.steps != steps or not has_work:
            self._marks[info.id] = mark = _Mark(steps, now_s)
        if info.state in (ReplicaState.STARTING, ReplicaState.FAILED):
            return Progress.DOWN
        if not has_work:
            return Progress.IDLE
        if info.state is ReplicaState.REPAIRING:
            return Progress.BUSY  # the repair has limits of its own, after which the replica has failed
        if info.progress_limit_s:
            # The leader's bound follows what its steps take; it acts on it itself, and is given the time. Its clock
            # stands still while the gang is repaired.
            is_overdue = info.progress_age_s > info.progress_limit_s + _MARGIN_S
        else:
            is_overdue = now_s - mark.since_s > self._stall_s
        return Progress.STALLED if is_overdue else Progress.BUSY

    def live(self) -> tuple[bool, dict[str, Progress]]:
        """False when replicas have work and none of those moves: a restart is due."""
        progress = self.observe()
        working = [state for state in progress.values() if state in (Progress.BUSY, Progress.STALLED)]
        return not working or Progress.BUSY in working, progress

    def ready(self) -> tuple[bool, str]:
        """Whether new requests can be served, and why not."""
        if self._is_draining():
            return False, "draining"
        infos, progress = self._replicas(), self.observe()
        stalled = {
            info.id
            for info in infos
            if progress.get(info.id) is Progress.STALLED or any(rank.state in _HANGING for rank in info.ranks)
        }
        if any(info.state is ReplicaState.READY and info.id not in stalled for info in infos):
            return True, "ready"
        states = ", ".join(
            f"{info.id} is {'stalled' if info.state is ReplicaState.READY and info.id in stalled else info.state}"
            for info in infos
        )
        states = states or "none has joined"
        return False, f"no replica is ready: {states}"
