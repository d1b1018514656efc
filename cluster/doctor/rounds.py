"""Which pairs of ranks measure at the same time. Pure."""

from collections.abc import Sequence
from itertools import combinations

Pair = tuple[int, int]


def measuring_rounds(hosts: Sequence[str]) -> tuple[tuple[Pair, ...], ...]:
    """Every pair of ranks once, in rounds in which no host is in two pairs: pairs that share a host's network or cores
    would measure each other. ``hosts``: each rank's."""
    left = list(combinations(range(len(hosts)), 2))
    rounds = []
    while left:
        busy: set[str] = set()
        chosen = []
        for first, second in left:
            if not busy & {hosts[first], hosts[second]}:
                busy |= {hosts[first], hosts[second]}
                chosen.append((first, second))
        rounds.append(tuple(chosen))
        taken = set(chosen)
        left = [pair for pair in left if pair not in taken]
    return tuple(rounds)
