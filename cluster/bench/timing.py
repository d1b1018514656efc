"""What one request's stream showed, and percentiles over many."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Timing:
    """One request. Times are ``perf_counter`` seconds; a target fills it in while the answer comes."""

    sent_s: float = 0.0
    lag_s: float = 0.0
    """How much later than planned the load generator sent it (open loop)."""
    chunks_s: list[float] = field(default_factory=list)
    """When each chunk with something of the answer arrived; it may hold several tokens."""
    ended_s: float = 0.0
    num_input: int = 0
    num_output: int = 0
    num_cached: int = 0
    is_counted: bool = False
    """Whether the server told the numbers of tokens; otherwise ``num_output`` is that of the chunks."""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]

    @property
    def token_s(self) -> float | None:
        """Mean time per token after the first; None where there was but one."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.num_output - 1) if self.num_output > 1 else None

    def finish(self, now_s: float) -> None:
        """The stream is over. An answer whose tokens have no text arrived when it ended."""
        self.ended_s = now_s
        self.chunks_s = self.chunks_s or [now_s]
        if not self.is_counted:
            self.num_output = len(self.chunks_s)


@dataclass(frozen=True)
class Percentiles:
    mean: float
    p50: float
    p90: float
    p99: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        if not values:
            return None
        p50, p90, p99 = (percentile(values, fraction) for fraction in (0.5, 0.9, 0.99))
        return cls(sum(values) / len(values), p50, p90, p99, max(values))


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear between the neighbours; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = (len(ordered) - 1) * fraction
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
