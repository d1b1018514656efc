"""Which dp group of a gang gets a request. Pure."""

from collections.abc import Sequence

_CACHED_WEIGHT = 0.5
_FULL_AT = 0.25
"""As the router weighs replicas: an idle group counts twice as much as one with a quarter of its slots in use, and a
wholly cached prompt is worth half of an idle group."""


def choose_group(loads: Sequence[int], cached_shares: Sequence[float], num_slots: int) -> int:
    """The index of the best group; the first of equals.

    Args:
        loads: requests that run or wait in each group.
        cached_shares: the part of the request's tokens whose keys and values each group holds already, 0 to 1.
        num_slots: requests that one group can run at a time.
    """
    scores = [
        1.0 / (1.0 + load / (_FULL_AT * num_slots)) + _CACHED_WEIGHT * share
        for load, share in zip(loads, cached_shares, strict=True)
    ]
    return scores.index(max(scores))
