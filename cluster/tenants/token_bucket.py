"""A token bucket. Pure: the time is an argument."""

SECONDS_PER_MINUTE = 60.0


class TokenBucket:
    """Holds ``per_minute`` at most, is full at first, and fills within a minute.

    So any window of ``w`` seconds lets at most ``per_minute × (1 + w / 60)`` through. It may be in debt: what was used
    beyond a reservation is paid by those that come later.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What can be taken. A clock that goes back stands still."""
        if now_s > self._at_s:
            gained = (now_s - self._at_s) * self.per_minute / SECONDS_PER_MINUTE
            self._level = min(float(self.per_minute), self._level + gained)
            self._at_s = now_s
        return self._level

    def resize(self, per_minute: int, now_s: float) -> None:
        """Another bound from now on; what was taken stays taken."""
        if per_minute != self.per_minute:
            self._level = self.level(now_s) + per_minute - self.per_minute
            self.per_minute = per_minute

    def take(self, amount: int, now_s: float) -> float:
        """Takes it and returns 0, or takes nothing and returns after how many seconds it would be there."""
        missing = amount - self.level(now_s)
        if missing > 0:
            return missing * SECONDS_PER_MINUTE / self.per_minute
        self._level -= amount
        return 0.0

    def give(self, amount: int, now_s: float) -> None:
        """Back, as far as there is room; a negative amount is taken, whether it is there or not."""
        self._level = min(float(self.per_minute), self.level(now_s) + amount)

    def reset_s(self, now_s: float) -> float:
        """Until it is full, if nothing is taken."""
        return (self.per_minute - self.level(now_s)) * SECONDS_PER_MINUTE / self.per_minute
