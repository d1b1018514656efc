"""A step that a rank has launched: its answer may still be under way from the device."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from engine.messages import StepResult
from engine.progress import Operation, RankProgress


class StepsUnderWay:
    """Of one rank: how many steps were launched and not answered, and how long each took."""

    def __init__(self, progress: RankProgress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._num_open = 0
        self._answered_s = 0.0
        self.durations_us: deque[int] = deque()
        """Of answered steps, for whoever launches to take."""

    def begin(self, step: int) -> None:
        with self._lock:
            self._num_open += 1
        self._progress.begin(step)

    def end(self, began_s: float) -> int:
        """Microseconds that the step took, without the time that its device had for the one before."""
        now_s = time.perf_counter()
        duration_us = int((now_s - max(began_s, self._answered_s)) * 1e6)
        self._answered_s = now_s
        self.durations_us.append(duration_us)
        with self._lock:
            self._num_open -= 1
            # Nobody launches now. Whoever does has opened a step, and writes himself where he is.
            if not self._num_open:
                self._progress.at(Operation.IDLE)
        return duration_us


class LaunchedStep:
    """``answer``: waits for the device where it must, in any thread. ``news``: further fields of the result."""

    def __init__(
        self,
        step: int,
        answer: Callable[[], StepResult],
        news: Mapping[str, Any],
        under_way: StepsUnderWay,
        began_s: float,
    ) -> None:
        self.step = step
        self._answer = answer
        self._news = news
        self._under_way = under_way
        self._began_s = began_s

    def finish(self) -> StepResult:
        """The rank's answer: once, in the order of steps, one thread for all. Raises what went wrong on the device."""
        result = self._answer()
        return msgspec.structs.replace(result, duration_us=self._under_way.end(self._began_s), **self._news)
