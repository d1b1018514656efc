"""How long a plan should take, learnt from those that returned. Pure; asks no clock.

Unlike the scheduler's prompt costs this looks for the long end: a watchdog that expects too little raises false alarms.
A step takes a base, and each token a cost that grows with its position, at most in proportion, since it attends to all
before it. Costs are kept for classes of positions, each twice as wide as the one before.
"""

from engine.messages import StepPlan
from engine.packed import num_packed

_FIRST_CLASS_TOKENS = 1024
_FORGET = 0.02
"""Share by which a larger value gives way to a smaller observation: some hundred steps are remembered."""


class StepTimes:
    """Seconds by plan."""

    def __init__(self) -> None:
        self._base_s: float | None = None
        """Of the fastest step in some time."""
        self._costs: dict[int, float] = {}
        """Seconds per token, by class of positions."""

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """``plan`` has been computed in so long."""
        if plan.adapters:
            return
        base = self._base_s
        base = seconds if base is None else min(seconds, base + _FORGET * (seconds - base))
        self._base_s = base
        shares = _largest(plan)
        expected = sum(self._cost(found, 1.0) * count for found, count in shares)
        if not shares or expected <= 0.0:
            return
        ratio = max(seconds - base, 0.05 * seconds) / expected
        for found, _ in shares:
            observed = self._cost(found, 1.0) * ratio
            known = self._costs.get(found, observed)
            self._costs[found] = max(observed, known + _FORGET * (observed - known))

    def predict(self, plan: StepPlan) -> float | None:
        """None where nothing is known, or the plan has ranks read files."""
        if self._base_s is None or plan.adapters:
            return None
        return self._base_s + sum(self._cost(found, 0.0) * count for found, count in _largest(plan))

    def _cost(self, found: int, unknown: float) -> float:
        """Where nothing is known of this class, a bound: what a later position costs, or as many times what an earlier
        one costs as the context is longer. ``unknown``: where nothing is known at all."""
        if found in self._costs:
            return self._costs[found]
        return min((cost * 2.0 ** max(0, found - known) for known, cost in self._costs.items()), default=unknown)


def _largest(plan: StepPlan) -> list[tuple[int, int]]:
    """(class of positions, tokens) of each request in the batch with the most tokens: dp groups work side by side.
    Where packed slots stand is not in the plan; they are of the first class."""
    batch = max(plan.batches, key=lambda batch: batch.num_tokens)
    shares = [((share.start // _FIRST_CLASS_TOKENS).bit_length(), share.num_tokens) for share in batch.scheduled]
    return [(0, num_packed(batch.decodes)), *shares] if batch.decodes else shares
