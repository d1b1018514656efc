"""Looks where a gang's ranks are, now and then while a plan is on its way, and says which one hangs.

The shell around engine.executor.watchdog: it has the clock and the channel. It needs no thread: whoever waits for a
plan looks, and while there is none nobody does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import ParallelConfig
from engine.errors import RankFailure
from engine.executor.channel import LeaderChannel
from engine.executor.step_times import StepTimes
from engine.executor.watchdog import PendingPlan, RankState, Verdict, Watchdog
from engine.messages import StepPlan
from engine.progress import RankSample

LOOK_INTERVAL_S = 0.25
_LEARN_INTERVAL_S = 0.05
"""Longer steps are learnt from; of shorter ones so many as come in this time, one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankReport:
    """What a rank is about, for people."""

    state: RankState
    sample: RankSample


class GangWatch:
    """Of one formation.

    Args:
        plan_timeout_s: for plans of which nobody knows how long they take.
        on_verdict: called with each, from the thread that looks.
        host_of: names a rank's host, for people; empty: nobody knows.
    """

    def __init__(
        self,
        channel: LeaderChannel,
        parallel: ParallelConfig,
        plan_timeout_s: float,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
        clock: Callable[[], float] = time.monotonic,
        host_of: Callable[[int], str] = lambda rank: "",
    ) -> None:
        self._host_of = host_of
        self._channel = channel
        self._parallel = parallel
        self._plan_timeout_s = plan_timeout_s
        self._on_verdict = on_verdict
        self._clock = clock
        self._times = StepTimes()
        self._next_look_s = 0.0
        self._next_lesson_s = 0.0
        self._has_rested = False
        self._lock = threading.Lock()
        self._watchdog = Watchdog(parallel, plan_timeout_s)
        self.limit_s = plan_timeout_s
        """How long the plan that is looked at may take in which nothing moves."""

    def start(self, devices: Sequence[str]) -> None:
        """``devices``: of the ranks, in order."""
        is_asynchronous = any(device.startswith("cuda") for device in devices)
        self._watchdog = Watchdog(self._parallel, self._plan_timeout_s, is_asynchronous=is_asynchronous)

    def begin(self, now_s: float) -> None:
        """A plan leaves while none is on its way."""
        self._next_look_s = now_s + LOOK_INTERVAL_S
        self.limit_s = self._plan_timeout_s
        self._has_rested = True

    def learn(self, plan: StepPlan, now_s: float, seconds: float) -> None:
        """``plan`` was answered by all, after so long."""
        if now_s >= self._next_lesson_s:
            self._next_lesson_s = now_s + _LEARN_INTERVAL_S
            self._times.observe(plan, seconds)

    def left_s(self, now_s: float) -> float:
        """Until the next look is due."""
        return self._next_look_s - now_s

    def look(self, plan: StepPlan, unanswered: Sequence[int]) -> None:
        """``plan`` is the oldest on its way. Raises RankFailure where a rank will not go on."""
        now_s = self._clock()
        self._next_look_s = now_s + LOOK_INTERVAL_S
        pending = PendingPlan(plan.step, unanswered, self._times.predict(plan))
        self.limit_s = self._watchdog.bound_s(pending)
        with self._lock:
            if self._has_rested:
                self._has_rested = False
                self._watchdog.rest()
            verdicts = self._watchdog.observe(now_s, self._channel.progress(), pending)
        for verdict in verdicts:
            level = logging.ERROR if verdict.is_final else logging.WARNING
            _log.log(level, "%s%s", verdict.reason, self._place_of(verdict.rank))
            self._on_verdict(verdict)
        for verdict in verdicts:
            if verdict.is_final:
                raise RankFailure(verdict.reason, verdict.rank)

    def _place_of(self, rank: int | None) -> str:
        """Behind a sentence about the rank."""
        host = "" if rank is None else self._host_of(rank)
        return f"; rank {rank} is on {host}" if host else ""

    def reports(self) -> list[RankReport]:
        """Of all ranks, in order; from any thread."""
        samples = self._channel.progress()
        with self._lock:
            return [RankReport(self._watchdog.state_of(sample), sample) for sample in samples]
