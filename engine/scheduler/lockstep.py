"""The requests that need no looking at: each plan computes one token more of them, and that is all."""

from collections import defaultdict

from engine.messages import NO_STEP
from engine.packed import pack
from engine.scheduler.request_state import RequestState
from engine.scheduler.step_in_flight import StepInFlight

_LEAST_PLANS = 2
"""It takes less time to share one token out than to come and go."""


class Lockstep:
    """Requests that decode in blocks that are there, fill none, give none back and do not reach their last token.

    How many plans that will hold is known when a request joins, so a plan touches only those whose time is up: one in
    sixteen, where a block has sixteen tokens. Meanwhile the counters of a member (``num_computed``, ``num_pending``)
    lack the plans that were made since, and its ``num_sent``, ``sample_step`` and ``last_step`` are old; ``leave`` puts
    them right.
    """

    def __init__(self) -> None:
        self._members: dict[int, RequestState] = {}
        """By slot."""
        self._leaving: defaultdict[int, list[RequestState]] = defaultdict(list)
        """By the number of plans after which they leave; some have left before."""
        self._num_plans = 0
        self._last_step = NO_STEP

    def __len__(self) -> int:
        return len(self._members)

    def join(self, state: RequestState, step: int) -> None:
        """Plan ``step``, the latest, samples for this request. It stays outside where that is not worth it."""
        last_end = min(state.num_block_tokens, state.unseen_at, state.max_num_tokens - 1) - 1
        num_plans = last_end - state.num_computed
        if num_plans < _LEAST_PLANS or state.sample_step != step:
            return
        self._last_step = step
        self._members[state.slot] = state
        state.lockstep_end = self._num_plans + num_plans
        self._leaving[state.lockstep_end].append(state)
        state.num_computed -= self._num_plans
        state.num_pending -= self._num_plans

    def leave(self, state: RequestState) -> None:
        """Before anything else happens to it than plans and results. One that is not here is let alone."""
        if state.lockstep_end == NO_STEP:
            return
        del self._members[state.slot]
        state.lockstep_end = NO_STEP
        state.num_computed += self._num_plans
        state.num_pending += self._num_plans
        state.num_sent = state.num_computed
        state.sample_step = state.last_step = self._last_step

    def release_due(self) -> None:
        """Lets those go whose time is up."""
        for state in self._leaving.pop(self._num_plans, ()):
            if state.lockstep_end == self._num_plans:
                self.leave(state)

    def dissolve(self) -> None:
        """Lets all go."""
        for state in list(self._members.values()):
            self.leave(state)
        self._leaving.clear()

    def advance(self, flight: StepInFlight) -> bytes:
        """All members have one more token in this plan. Their slots, as BatchPlan.decodes has them."""
        if not self._members:
            return b""
        self._num_plans += 1
        self._last_step = flight.step
        flight.sampling = self._members.copy()
        flight.num_decodes = len(self._members)
        return pack(self._members)
