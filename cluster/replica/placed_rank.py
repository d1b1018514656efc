"""Where one rank of a replica is to run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlacedRank:
    """``host`` is the address under which other hosts reach the rank's host."""

    rank: int
    host: str
