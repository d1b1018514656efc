"""Tells a rank that takes its time to start from one that will not go on. Pure: samples and a clock in.

While ranks load, nobody knows how long that may take, and they do not meet in collectives yet, so the watchdog
(engine.executor.watchdog) has nothing to go by. What the kernel says of their processes is left, and whether their
hosts report at all.
"""

from collections.abc import Iterable

from engine.errors import RankFailure
from engine.progress import RankSample

STOPPED_S = 2.0
SILENT_S = 30.0
"""A relay shares its process with a rank that imports and loads, which may keep it from reporting for seconds."""
_MAX_TICK_S = 2.0
"""Time in which nobody looked does not count: the machine may have been suspended."""


class StartWatch:
    """Of one start."""

    def __init__(self) -> None:
        self._stopped_s: dict[int, float] = {}
        """How long each rank has been seen stopped."""
        self._last_s: float | None = None

    def observe(self, now_s: float, samples: Iterable[RankSample]) -> RankFailure | None:
        """Of the ranks that are connected. The rank that will not go on, and why."""
        tick_s = 0.0 if self._last_s is None else min(_MAX_TICK_S, now_s - self._last_s)
        self._last_s = now_s
        for sample in samples:
            rank = sample.rank
            if sample.process_state in ("T", "t"):
                self._stopped_s[rank] = self._stopped_s.get(rank, -tick_s) + tick_s
                if self._stopped_s[rank] >= STOPPED_S:
                    return RankFailure(f"rank {rank} does not go on with its start: its process is stopped", rank)
            else:
                self._stopped_s.pop(rank, None)
            if sample.report_age_s >= SILENT_S:
                return RankFailure(
                    f"rank {rank} does not go on with its start: its host has reported nothing for {SILENT_S:g} s", rank
                )
        return None
