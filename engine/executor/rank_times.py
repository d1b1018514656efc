"""How long each rank of a replica has computed, over all its formations."""

import time
from collections.abc import Mapping

from engine.messages import StepResult
from engine.timeline import Moment


class RankTimes:
    """Sums, so that keeping them costs a step one addition for each rank.

    Args:
        num_ranks: of the gang.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_steps = 0
        self._busy_us = [0] * num_ranks

    def answered(self, results: Mapping[int, StepResult]) -> None:
        """A step has been computed: every rank's answer."""
        self._num_steps += 1
        busy_us = self._busy_us
        for rank, result in results.items():
            busy_us[rank] += result.duration_us

    def moment(self) -> Moment:
        """Now."""
        return Moment(time.monotonic(), self._num_steps, tuple(self._busy_us))
