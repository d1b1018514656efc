"""When requests of an open loop are sent, whatever the server does."""

import enum
import itertools
import random
from collections.abc import Iterator


class Arrivals(enum.StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"


def arrival_times(kind: Arrivals, rate: float, generator: random.Random) -> Iterator[float]:
    """Seconds since the start, without end; the first request comes at 0. ``rate``: requests a second."""
    if kind is Arrivals.CONSTANT:
        return (index / rate for index in itertools.count())
    return itertools.accumulate((generator.expovariate(rate) for _ in itertools.count()), initial=0.0)
