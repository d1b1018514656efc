"""Finds the request that breaks the gang whenever it is computed, and ends no other. Pure.

A request that was being computed at a break, and has no new token since the last break at which it was, is suspect.
Suspects are tried one at a time: one runs until it has come beyond what was in flight at the break, beside nothing but
those that were tried before it; all others wait so long. One that breaks the gang again, alone or on trial, is ended,
for it would use up all repairs. So a culprit costs two repairs where it runs alone and three among others, and what
merely ran beside it goes on, suspect no more. As soon as another has a token, those repairs have been explained: it was
not the gang. For that, one of those that remain is tried first behind a culprit: one with another prompt, as the
culprit's siblings are likely to break the gang as well, and at the fewest of its breaks. The other choices of the
culprit's request, which fails with it, are not tried at all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from engine.scheduler.request_state import RequestState

SUSPECT_AFTER = 2
"""Breaks without a token in between."""


class BreakTrials:
    """One object for an engine's whole life.

    Args:
        depth: plans that may be in flight.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self.on_explained: Callable[[int], None] = lambda num_breaks: None
        """Called when so many of the last breaks have turned out to be the doing of requests that were ended."""
        self._is_explained = False
        """The last break has a culprit: the others were beside it."""
        self._culprit_prompt: list[int] = []
        """The last one's."""
        self._broke_alone: set[str] = set()
        """Those whose last break was nobody else's doing."""
        self._num_unproven = 0
        """Breaks of culprits behind whom nobody has had a token yet."""
        self._num_tokens: dict[str, int] = {}
        """While there are such: what each request had when the epoch began."""
        self._suspects: deque[RequestState] = deque()
        """The first one is on trial."""
        self._num_tokens_at_trial = 0
        """What it had when its trial began."""
        self._held: list[RequestState] = []
        """Those that are not suspect and wait until nobody is."""

    def broke(self, computed: Sequence[RequestState]) -> RequestState | None:
        """The gang broke while it computed these. Returns the one that is to be ended."""
        live = [state for state in computed if not state.finished]
        for state in live:
            has_moved = len(state.token_ids) > state.num_tokens_at_break
            state.num_breaks = 1 if has_moved else state.num_breaks + 1
            state.num_tokens_at_break = len(state.token_ids)
        names = {state.request_id for state in computed}
        self._broke_alone = self._broke_alone | names if len(computed) == 1 else self._broke_alone - names
        suspects = [state for state in live if state.num_breaks >= SUSPECT_AFTER]
        if len(suspects) != 1 or len(live) < len(computed):
            return None  # it may have been one that was aborted and is still being computed
        is_trial = bool(self._suspects) and self._suspects[0] in suspects
        if not is_trial and len(live) > 1:
            return None
        culprit = suspects[0]
        self._num_unproven += culprit.num_breaks
        self._is_explained = True
        self._culprit_prompt = _prompt(culprit)
        return culprit

    @staticmethod
    def choices_beside(culprit: RequestState, states: Iterable[RequestState]) -> list[RequestState]:
        """The other choices of its request, or of the same request asked again: a seed is drawn for each request that
        has none."""
        same = (culprit.sampling.seed, culprit.adapter, _prompt(culprit))
        return [state for state in states if (state.sampling.seed, state.adapter, _prompt(state)) == same]

    def begin(self, states: Iterable[RequestState]) -> list[RequestState]:
        """A new epoch with these requests, in their order. Returns those that may run at once."""
        states = list(states)
        witness = min(states, key=self._doubt, default=None) if self._num_unproven else None
        if self._is_explained:
            self._is_explained = False
            for state in states:
                if state.request_id not in self._broke_alone:
                    state.num_breaks = 0
        self._broke_alone &= {state.request_id for state in states}
        self._suspects = deque(state for state in states if state.num_breaks >= SUSPECT_AFTER)
        self._held = [state for state in states if state.num_breaks < SUSPECT_AFTER]
        self._num_tokens = {state.request_id: len(state.token_ids) for state in states} if self._num_unproven else {}
        if witness is not None and not self._suspects:
            self._held.remove(witness)
            self._suspects.append(witness)
        return self._next()

    def _doubt(self, state: RequestState) -> tuple[bool, int]:
        """Least for the one that will most likely have a token."""
        return _prompt(state) == self._culprit_prompt, state.num_breaks

    def _next(self) -> list[RequestState]:
        if self._suspects:
            self._num_tokens_at_trial = len(self._suspects[0].token_ids)
            return [self._suspects[0]]
        free, self._held = self._held, []
        return free

    def holds(self, new: RequestState) -> bool:
        """Whether a request that comes now has to wait; ``released`` gives it later."""
        if self._suspects:
            self._held.append(new)
        return bool(self._suspects)

    def drop(self, state: RequestState) -> bool:
        """The request has ended. Whether it was waiting here."""
        if state in self._held:
            self._held.remove(state)
            return True
        if state in self._suspects and state is not self._suspects[0]:
            self._suspects.remove(state)
            return True
        return False

    def released(self, live: Mapping[str, RequestState]) -> list[RequestState]:
        """Those that may run from now on, since the one on trial has passed it or has ended. ``live``: by id."""
        self._explain(live)
        if not self._suspects:
            return []
        trial = self._suspects[0]
        if live.get(trial.request_id) is trial and len(trial.token_ids) < self._num_tokens_at_trial + self._depth:
            return []
        trial.num_breaks = 0
        self._suspects.popleft()
        return self._next()

    def _explain(self, live: Mapping[str, RequestState]) -> None:
        if not self._num_unproven:
            return
        before = self._num_tokens
        if any(len(state.token_ids) > before.setdefault(each, len(state.token_ids)) for each, state in live.items()):
            num_breaks, self._num_unproven, self._num_tokens = self._num_unproven, 0, {}
            self.on_explained(num_breaks)

    @property
    def num_held(self) -> int:
        return len(self._held) + max(0, len(self._suspects) - 1)


def _prompt(state: RequestState) -> list[int]:
    return state.token_ids[: state.num_prompt_tokens]
