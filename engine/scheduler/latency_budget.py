"""How many prompt tokens a step may take while other requests decode, so that their gap between tokens stays bounded.

Learns from the durations of steps that returned; asks no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler.prompt_costs import PromptCosts, PromptShare

_LEAST_TOKENS = 16
"""Of a step's first prompt: it always gets on, however slow, and also while nothing is known of its cost."""
_WEIGHT = 0.2
"""Of a new observation in the running mean: some ten steps are remembered."""
_TRUSTED_STEPS = 64
"""After so many steps with prompts one decodes alone, so that it is known how long that takes now."""
_DOUBTED_STEPS = 8
"""The same where twice or half as many requests decode as when it was last seen."""


@dataclass(slots=True)
class TokenBudget:
    """Of one step: ``left`` tokens in all, ``prompts_left`` of prompts and ``decodes_left`` of requests that decode
    (None: no bound of their own)."""

    left: int
    prompts_left: int | None
    decodes_left: int | None = None

    seconds_left: float | None = None
    """By which prompts may make the step longer; None: no bound."""
    costs: PromptCosts | None = None
    """What their tokens cost, where there is such a bound."""
    has_prompt: bool = False

    @property
    def for_prompts(self) -> int:
        """0: none at all; else see ``prompt_tokens``."""
        if self.has_prompt and self.seconds_left is not None and self.seconds_left <= 0.0:
            return 0
        return self.left if self.prompts_left is None else min(self.left, self.prompts_left)

    def prompt_tokens(self, position: int) -> int:
        """Most tokens that a prompt may take from ``position`` on."""
        most = self.for_prompts
        if self.seconds_left is None or most == 0:
            return most
        affordable = int(self.seconds_left / self.costs.at(position)) if self.costs else 0
        return min(most, affordable if self.has_prompt else max(affordable, _LEAST_TOKENS))

    def take(self, num_tokens: int, position: int) -> None:
        """A request gets ``num_tokens`` from ``position`` on; more than one are a prompt's."""
        self.left -= num_tokens
        if num_tokens > 1:
            self.has_prompt = True
            if self.prompts_left is not None:
                self.prompts_left -= num_tokens
            if self.seconds_left is not None:
                self.seconds_left -= num_tokens * self.costs.at(position) if self.costs else self.seconds_left
        if num_tokens == 1 and self.decodes_left:
            self.decodes_left -= 1

    def narrow(self, max_decodes: int, max_prompt_tokens: int) -> None:
        """Bounds of a micro-batch, besides those that there are."""
        self.decodes_left = max_decodes
        self.prompts_left = min(max_prompt_tokens, self.for_prompts)


class LatencyBudget:
    """A step of decodes alone takes so long, each prompt token so much more.

    Args:
        stretch: a step with prompt tokens may be predicted to take so many times as long as one without.
    """

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decode_s: float | None = None
        self._num_decodes = 0
        """When ``_decode_s`` was last seen."""
        self._num_steps_since = 0
        """Since a step decoded alone, or was told to."""
        self._is_measured = False
        self._costs = PromptCosts()

    def of_step(self, max_num_tokens: int, num_decodes: int) -> TokenBudget:
        """Of a step of at most ``max_num_tokens`` in which ``num_decodes`` requests decode."""
        if num_decodes == 0 or not self._is_measured:
            return TokenBudget(max_num_tokens, None)
        if self._decode_s is None or self._is_doubtful(num_decodes):
            self._num_steps_since = 0
            return TokenBudget(max_num_tokens, prompts_left=0)
        spare_s = (self._stretch - 1.0) * self._decode_s
        return TokenBudget(max_num_tokens, None, seconds_left=spare_s, costs=self._costs)

    def _is_doubtful(self, num_decodes: int) -> bool:
        is_other = not self._num_decodes <= 2 * num_decodes <= 4 * self._num_decodes
        return self._num_steps_since >= (_DOUBTED_STEPS if is_other else _TRUSTED_STEPS)

    def observe(self, num_decodes: int, prompts: Sequence[PromptShare], duration_s: float) -> None:
        """A step has returned that took ``duration_s`` (0: not measured)."""
        if duration_s <= 0.0:
            return
        self._is_measured = True
        if not prompts:
            is_other = not self._num_decodes <= 2 * num_decodes <= 4 * self._num_decodes
            known = self._decode_s
            self._decode_s = duration_s if known is None or is_other else known + _WEIGHT * (duration_s - known)
            self._num_decodes, self._num_steps_since = num_decodes, 0
            return
        self._num_steps_since += num_decodes > 0
        if sum(count for _, count in prompts) >= _LEAST_TOKENS:
            decode_s = self._decode_s if num_decodes and self._decode_s is not None else 0.0
            # A faster step than decoding alone says only that prompt tokens are cheap.
            self._costs.observe(prompts, max(duration_s - decode_s, 0.05 * duration_s))
