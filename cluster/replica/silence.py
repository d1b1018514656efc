"""When a leader hangs: it lives, and answers nobody."""

SILENT_S = 15.0
"""A leader that has answered nothing for so long hangs. Front ends think of a replica as lost 30 s after it fell silent
for them."""
_MAX_TICK_S = 3.0


class Silence:
    """How long a question has been left without an answer. Time in which nobody looked does not count: this process, or
    the machine, may have been suspended. Pure; ``now_s``: seconds of any clock that never goes back."""

    def __init__(self, now_s: float) -> None:
        self._looked_s = now_s
        self._silent_s = 0.0

    def look(self, now_s: float) -> float:
        """Seconds so far."""
        self._silent_s += min(now_s - self._looked_s, _MAX_TICK_S)
        self._looked_s = now_s
        return self._silent_s
