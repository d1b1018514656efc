"""An engine whose state can be noted between two plans, and taken up from there by another (``remuda replay``)."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.config import CacheConfig
from engine.engine import Engine
from engine.executor.executor import PendingResults
from engine.messages import StepPlan
from engine.request import Request
from engine.scheduler.request_state import RequestState
from engine.scheduler.snapshot import Snapshot, freeze, thaw


class EngineState(msgspec.Struct, frozen=True, gc=False):
    """Of an engine with no plan half made. ``turn``: calls of ``step`` that had begun, the present one included.
    ``steps_in_flight``: of plans that had left and whose results were not taken in."""

    turn: int
    epoch: int
    cache_config: CacheConfig
    next_step: int
    num_arrivals: int
    steps_in_flight: list[int]
    scheduling: Snapshot


class ResumableEngine(Engine):
    """See Engine."""

    def _state(self, turn: int) -> EngineState:
        """For the moment in which the next plan is about to be drafted: the ranks compute, nothing is half done, and
        the outputs of the step are all that is not in it."""
        return EngineState(
            turn,
            self._epoch,
            self._cache_config,
            self._next_step,
            self._num_arrivals,
            [plan.step for plan, _ in self._in_flight],
            freeze({"states": list(self._states.values()), **self._parts()}),
        )

    def _parts(self) -> dict[str, Any]:
        return {"schedulers": self._schedulers, "trials": self.trials, "adapters": self._adapters}

    def resume(
        self,
        state: EngineState,
        requests: Mapping[int, Request],
        in_flight: Mapping[int, tuple[StepPlan, PendingResults]],
    ) -> list[tuple[Request, list[int]]]:
        """A new engine, made for the state's epoch and cache, goes on from there. ``requests``: by arrival.
        ``in_flight``: by step.

        Returns the live requests with the tokens that each has got since. Raises
        engine.scheduler.snapshot.Unreadable.
        """
        roots = thaw(state.scheduling, requests, self._parts(), state.cache_config.block_size)
        live: list[RequestState] = roots["states"]
        self._states = {each.request_id: each for each in live}
        self._next_step, self._num_arrivals = state.next_step, state.num_arrivals
        self._in_flight = deque(in_flight[step] for step in state.steps_in_flight)
        self._make_draft()
        return [(requests[each.arrival], each.token_ids[each.num_given_tokens :]) for each in live]
