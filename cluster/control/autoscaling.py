"""How many replicas a model should have. Pure: loads in, a number out.

How long another number must have been wanted before it is had, Ray Serve sees to: ``UP_DELAY_S``, ``DOWN_DELAY_S``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET = 0.8
"""Share of its slots that a replica should have in use."""
UP_DELAY_S = 2.0
DOWN_DELAY_S = 120.0
"""Longer, because a replica takes long to load."""


@dataclass(frozen=True)
class ReplicaLoad:
    """Requests that one replica's leader has running and waiting, and how many it can run at once."""

    num_running: float
    num_waiting: float
    max_num_seqs: float


def wanted_replicas(num_replicas: int, loads: Sequence[ReplicaLoad], least: int, most: int) -> int:
    """So many that all requests together take the target share of the slots, from ``least`` to ``most``.

    Fewer come one at a time, for what a replica holds must drain first.

    Args:
        num_replicas: the number decided last, those that still start included.
        loads: of the replicas that have told theirs; others count as idle. Where none has, the number stays.
    """
    slots = max((load.max_num_seqs for load in loads), default=0.0)
    requests = sum(load.num_running + load.num_waiting for load in loads)
    wanted = math.ceil(requests / (slots * TARGET)) if slots else num_replicas
    return min(max(wanted, num_replicas - 1, least), most)
