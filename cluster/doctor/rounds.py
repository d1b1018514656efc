"""Which pairs of ranks measure at the same time. Pure."""

from collections.abc import Sequence
from itertools import combinations

Pair = tuple[int, int]


def measuring_rounds(gangs: Sequence[Sequence[str]]) -> tuple[tuple[Pair, ...], ...]:
    """Every pair of ranks of a gang once, in rounds in which no host is in two pairs: pairs that share a host's network
    or cores would measure each other. ``gangs``: each rank's host; ranks are numbered through all gangs."""
    hosts = [host for gang in gangs for host in gang]
    left: list[Pair] = []
    first_rank = 0
    for gang in gangs:
        left += combinations(range(first_rank, first_rank + len(gang)), 2)
        first_rank += len(gang)
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


def begun_key(number: int) -> str:
    """Of the store in which ranks meet: it is there once all of them are in this round."""
    return f"turn/{number}/all"
