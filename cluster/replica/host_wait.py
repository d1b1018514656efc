"""When a newcomer waits for a host, and how long. Pure."""

STAY_INTERVAL_S = 20.0
"""Between two words to those that wait with it; well below a rank's lease."""


class HostWait:
    """Args:
    wait_s: so long nobody needs to have room for a newcomer; 0: no time at all.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since_s: float | None = None
        self._told_s = 0.0

    def goes_on(self, has_room: bool, now_s: float) -> bool:
        """Whether to wait on. False where there is room, and when the time is up."""
        if has_room or not self._wait_s:
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s, self._told_s = now_s, now_s - STAY_INTERVAL_S
        return now_s < self._since_s + self._wait_s

    def is_time_to_tell(self, now_s: float) -> bool:
        """True at the beginning, and now and then: the others must hear that they are still wanted."""
        if now_s < self._told_s + STAY_INTERVAL_S:
            return False
        self._told_s = now_s
        return True
