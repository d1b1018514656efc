"""How many replicas a model should have. Pure: loads and the time in, a number out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ReplicaLoad:
    """Requests that one replica's leader has running and waiting, and how many it can run at once."""

    num_running: float
    num_waiting: float
    max_num_seqs: float


@dataclass(frozen=True)
class ScalingBounds:
    """``target``: share of its slots that a replica should have in use. Growth waits ``up_after_s`` for the wish to
    last, shrinking ``down_after_s``, because a replica takes long to load."""

    min_replicas: int
    max_replicas: int
    target: float = 0.8
    up_after_s: float = 2.0
    down_after_s: float = 120.0


@dataclass(frozen=True)
class ScalingState:
    """What must be remembered between decisions: since when another number has been wanted, and whether a larger one."""

    since_s: float | None = None
    upwards: bool = False


def wanted_replicas(loads: Sequence[ReplicaLoad], bounds: ScalingBounds) -> int:
    """So many that all requests together would take the target share of the slots; within the bounds."""
    slots = max((load.max_num_seqs for load in loads), default=0.0)
    requests = sum(load.num_running + load.num_waiting for load in loads)
    wanted = math.ceil(requests / (slots * bounds.target)) if slots else bounds.min_replicas
    return min(max(wanted, bounds.min_replicas), bounds.max_replicas)


def decide(
    num_replicas: int, loads: Sequence[ReplicaLoad], bounds: ScalingBounds, state: ScalingState, now_s: float
) -> tuple[int, ScalingState]:
    """The number to have from now on, and the state for the next decision.

    It grows to what is wanted at once, and shrinks by one at a time: what a replica holds must drain first.

    Args:
        num_replicas: the number decided last, those that still start included.
        loads: of the replicas that have told theirs; others count as idle.
        now_s: monotonic.
    """
    wanted = wanted_replicas(loads, bounds)
    inside = min(max(num_replicas, bounds.min_replicas), bounds.max_replicas)
    if wanted == num_replicas or inside != num_replicas:
        return inside, ScalingState()
    upwards = wanted > num_replicas
    if state.since_s is None or state.upwards != upwards:
        state = ScalingState(now_s, upwards)
    assert state.since_s is not None
    if now_s - state.since_s < (bounds.up_after_s if upwards else bounds.down_after_s):
        return num_replicas, state
    return (wanted if upwards else num_replicas - 1), replace(state, since_s=None)
