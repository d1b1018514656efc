"""Decides what becomes of a gang that loses processes: whom to replace, when to form anew, when to give up.

Pure: events in (methods), actions out, time as an argument; the supervisor carries the actions out, and a simulation
can do the same. One object per replica, for its whole life.

The life of a gang is a row of formations, numbered by epoch. The present one is FORMING until the leader says that all
ranks are ready, then SERVING. It is over when a rank or the leader is lost, when the leader says that it broke, or when
ranks do not join in time; what follows is the next one, of the survivors and of a newcomer for each that is lost. What
is told of an earlier formation, or of an earlier life of a rank, comes too late and changes nothing.
"""

import enum
import math
from collections import deque
from dataclasses import dataclass

MAX_REPAIRS = 5
REPAIR_WINDOW_S = 600.0
"""A gang that had to be repaired more often in so long has a reason for it that repairs do not mend. Leaders that were
lost are counted apart, and as many: they say nothing against the gang, which may be trying requests meanwhile."""
JOIN_TIMEOUT_S = 20.0
"""A survivor that has not joined a formation by then hangs."""
SAME_FAULT_S = 10.0
"""Losses within so long are one fault: the processes of a host end one after the other."""


@dataclass(frozen=True)
class KillRank:
    """End the rank's present process, if it still lives."""

    rank: int


@dataclass(frozen=True)
class StartRank:
    """A new process, the ``life``-th, for a rank whose place is empty."""

    rank: int
    life: int


@dataclass(frozen=True)
class StartLeader:
    """A new leader, the ``life``-th, beside rank 0."""

    life: int


@dataclass(frozen=True)
class Form:
    """The leader opens a channel for ``epoch``, and all ranks are told of it."""

    epoch: int


@dataclass(frozen=True)
class GiveUp:
    """The replica has failed for good."""

    reason: str


Action = KillRank | StartRank | StartLeader | Form | GiveUp


class Phase(enum.StrEnum):
    FORMING = "forming"
    SERVING = "serving"
    FAILED = "failed"


class Recovery:
    """Args:
    num_ranks: of the gang. All of them and the leader have been started; ``epoch`` is forming.
    now_s: the time, as in all methods; seconds of any clock that never goes back.
    """

    def __init__(self, num_ranks: int, now_s: float, epoch: int = 0) -> None:
        self._num_ranks = num_ranks
        self._lives = [0] * num_ranks
        self._leader_life = 0
        self._epoch = epoch
        self._phase = Phase.FORMING
        self._joined: set[int] = set()
        """Of the present formation."""
        self._loaded: set[int] = set()
        """Those that have their weights. They have nothing to do but to join."""
        self._told_at_s: float | None = None
        self.reason = ""
        """Why the last repair began."""
        self._repairs: deque[float] = deque()
        """When the gang broke."""
        self._leader_losses: deque[float] = deque()
        self._fault_at_s = -math.inf
        """When the last of either began."""
        self._began_at_s = [now_s] * num_ranks
        """When each rank's present life began."""

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def epoch(self) -> int:
        return self._epoch

    def life_of(self, rank: int) -> int:
        return self._lives[rank]

    @property
    def leader_life(self) -> int:
        return self._leader_life

    @property
    def awaited(self) -> set[int]:
        """Newcomers of the present formation that the leader has not heard of: they may take their time."""
        if self._phase is not Phase.FORMING or self._told_at_s is None:
            return set()
        return set(range(self._num_ranks)) - self._joined - self._loaded

    @property
    def loaded(self) -> frozenset[int]:
        """Ranks that have their weights: they have nothing to do but to join, and are bound by JOIN_TIMEOUT_S."""
        return frozenset(self._loaded)

    def rank_ended(self, rank: int, life: int, reason: str, now_s: float) -> list[Action]:
        """The rank's process is gone."""
        if self._phase is Phase.FAILED or life != self._lives[rank]:
            return []
        return self._repair({rank}, reason, now_s)

    def leader_ended(self, life: int, reason: str, now_s: float) -> list[Action]:
        """The leader's process is gone, or answers nobody."""
        if self._phase is Phase.FAILED or life != self._leader_life:
            return []
        return self._repair(set(), reason, now_s, loses_leader=True)

    def gang_broke(self, epoch: int, culprit: int | None, reason: str, now_s: float) -> list[Action]:
        """The leader says that the formation is over: a rank is lost, hangs, raised, or answered what it must not.

        ``culprit``: is replaced, dead or not. None: nobody knows; those that do not join the next formation are it.
        """
        if self._phase is Phase.FAILED or epoch != self._epoch:
            return []
        return self._repair(set() if culprit is None else {culprit}, reason, now_s)

    def told(self, epoch: int, now_s: float) -> None:
        """The ranks have been told of the formation."""
        if epoch == self._epoch:
            self._told_at_s = now_s

    def rank_joined(self, epoch: int, rank: int) -> None:
        """The leader has heard of the rank."""
        if epoch == self._epoch:
            self._joined.add(rank)

    def rank_loaded(self, epoch: int, rank: int) -> None:
        """The rank has its weights."""
        if epoch == self._epoch:
            self._loaded.add(rank)

    def formed(self, epoch: int) -> None:
        """All ranks are ready, and the leader serves."""
        if self._phase is Phase.FORMING and epoch == self._epoch:
            self._phase = Phase.SERVING

    def explained(self, num_breaks: int) -> None:
        """So many of the last repairs were the doing of requests that have been ended, and the gang has gone on since:
        they say nothing against it."""
        for _ in range(min(num_breaks, len(self._repairs))):
            self._repairs.pop()

    def impossible(self, reason: str) -> list[Action]:
        """An action could not be carried out: there is no place for a rank."""
        return self._give_up(reason)

    def tick(self, now_s: float) -> list[Action]:
        """To be called now and then."""
        if self._phase is not Phase.FORMING or self._told_at_s is None or now_s - self._told_at_s < JOIN_TIMEOUT_S:
            return []
        missing = self._loaded - self._joined
        if not missing:
            return []
        names = ", ".join(map(str, sorted(missing)))
        return self._repair(missing, f"rank {names} did not join epoch {self._epoch} in {JOIN_TIMEOUT_S:g} s", now_s)

    def _repair(self, lost: set[int], reason: str, now_s: float, *, loses_leader: bool = False) -> list[Action]:
        self.reason = reason
        if not self._is_same_fault(lost, now_s):
            repairs = self._leader_losses if loses_leader else self._repairs
            while repairs and now_s - repairs[0] > REPAIR_WINDOW_S:
                repairs.popleft()
            if len(repairs) == MAX_REPAIRS:
                return self._give_up(f"{reason}; {MAX_REPAIRS} repairs in {REPAIR_WINDOW_S:g} s did not help")
            repairs.append(now_s)
            self._fault_at_s = now_s
        actions: list[Action] = []
        if loses_leader:
            self._leader_life += 1
            actions.append(StartLeader(self._leader_life))
        for rank in sorted(lost):
            self._lives[rank] += 1
            self._began_at_s[rank] = now_s
            actions += [KillRank(rank), StartRank(rank, self._lives[rank])]
        self._epoch += 1
        self._phase, self._told_at_s = Phase.FORMING, None
        self._joined = set()
        self._loaded -= lost
        return [*actions, Form(self._epoch)]

    def _is_same_fault(self, lost: set[int], now_s: float) -> bool:
        """As the last repair's: nobody is lost who was new in it."""
        if self._phase is not Phase.FORMING or now_s - self._fault_at_s > SAME_FAULT_S:
            return False
        return bool(lost) and all(self._began_at_s[rank] < self._fault_at_s for rank in lost)

    def _give_up(self, reason: str) -> list[Action]:
        if self._phase is Phase.FAILED:
            return []
        self._phase = Phase.FAILED
        return [GiveUp(reason)]
