"""What a prompt token costs, learnt from the durations of steps, by how far into its context it stands.

A token attends to all before it, so its cost grows with its position, at most in proportion. Costs are kept for classes
of positions, each twice as wide as the one before.
"""

from collections.abc import Sequence

_FIRST_CLASS_TOKENS = 1024
_WEIGHT_UP, _WEIGHT_DOWN = 0.5, 0.2
"""Of a new observation in the running means; costs that rise (a prompt that gets on) must not be met too late."""

PromptShare = tuple[int, int]
"""First position, and how many tokens from there."""


class PromptCosts:
    """Seconds per prompt token, without what the step would have taken anyway."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._seconds)

    def at(self, position: int) -> float:
        """Something must be known. Where nothing is known of this class, a bound: what a later position costs, or as
        many times what an earlier one costs as the context is longer."""
        found = _class_of(position)
        if found in self._seconds:
            return self._seconds[found]
        bounds = [seconds * 2.0 ** max(0, found - known) for known, seconds in self._seconds.items()]
        return min(bounds)

    def observe(self, shares: Sequence[PromptShare], seconds: float) -> None:
        """A step's prompt tokens have taken ``seconds`` together."""
        is_first = not self._seconds
        predicted = [1.0 if is_first else self.at(start) for start, _ in shares]
        ratio = seconds / sum(cost * count for cost, (_, count) in zip(predicted, shares, strict=True))
        for cost, (start, _) in zip(predicted, shares, strict=True):
            found, value = _class_of(start), cost * ratio
            mean = self._seconds.get(found)
            if mean is None:
                self._seconds[found] = value
            else:
                self._seconds[found] = mean + (_WEIGHT_UP if value > mean else _WEIGHT_DOWN) * (value - mean)


def _class_of(position: int) -> int:
    return (position // _FIRST_CLASS_TOKENS).bit_length()
