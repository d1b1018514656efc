"""How many prompt tokens a step may take while other requests decode, so that their gap between tokens stays bounded.

Learns from the durations of steps that returned; asks no clock.
"""

from dataclasses import dataclass

_FIRST_TOKENS = 128
"""Prompt tokens beside decodes while nothing is known of their cost."""
_LEAST_TOKENS = 16
"""A prompt always gets on, however slow."""
_WEIGHT = 0.2
"""Of a new observation in the running means: some ten steps are remembered."""


@dataclass(slots=True)
class TokenBudget:
    """Of one step: ``left`` tokens in all, ``prompts_left`` of prompts and ``decodes_left`` of requests that decode
    (None: no bound of their own)."""

    left: int
    prompts_left: int | None
    decodes_left: int | None = None

    @property
    def for_prompts(self) -> int:
        return self.left if self.prompts_left is None else min(self.left, self.prompts_left)

    def take(self, num_tokens: int) -> None:
        """A request gets ``num_tokens``; more than one are a prompt's."""
        self.left -= num_tokens
        if num_tokens > 1 and self.prompts_left is not None:
            self.prompts_left -= num_tokens
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
        self._prompt_token_s: float | None = None

    def num_prompt_tokens(self, num_decodes: int) -> int | None:
        """Most prompt tokens of a step that also decodes for ``num_decodes`` requests; None: any number."""
        if num_decodes == 0 or self._decode_s is None:
            return None
        if self._prompt_token_s is None:
            return _FIRST_TOKENS
        spare_s = (self._stretch - 1.0) * self._decode_s
        return max(_LEAST_TOKENS, int(spare_s / self._prompt_token_s))

    def observe(self, num_decodes: int, num_prompt_tokens: int, duration_s: float) -> None:
        """A step has returned that took ``duration_s`` (0: not measured)."""
        if duration_s <= 0.0:
            return
        if num_prompt_tokens == 0:
            self._decode_s = _mean(self._decode_s, duration_s)
        elif num_prompt_tokens >= _LEAST_TOKENS:
            decode_s = self._decode_s if num_decodes and self._decode_s is not None else 0.0
            # A faster step than decoding alone says only that prompt tokens are cheap.
            self._prompt_token_s = _mean(
                self._prompt_token_s, max(duration_s - decode_s, 0.05 * duration_s) / num_prompt_tokens
            )


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _WEIGHT * (value - mean)
