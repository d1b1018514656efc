"""What goes wrong in a run, drawn from its seed."""

import enum
import random
from dataclasses import dataclass


class FaultKind(enum.StrEnum):
    LEADER_DIES = "leader dies"
    LEADER_HANGS = "leader hangs"
    RANK_DIES = "rank dies"
    RANK_STOPS = "rank stops"
    HOST_DIES = "host dies"
    FRONT_END_DIES = "front end dies"
    LINK_CUT = "link cut"
    CONNECTION_RESET = "connection reset"
    SLOW_LINK = "slow link"
    FRAME_TWICE = "frame twice"
    FRAMES_SWAPPED = "frames swapped"
    SLOW_DISK = "slow disk"
    SLOW_STEPS = "slow steps"
    DRAIN = "drain"
    CLOCK_JUMP = "clock jump"


@dataclass(frozen=True)
class Fault:
    """``replica`` and ``front_end`` are indices: whom it hits. ``duration_s``: of what heals by itself."""

    at_s: float
    kind: FaultKind
    replica: int
    front_end: int
    duration_s: float


@dataclass(frozen=True)
class Scenario:
    """``spread_s``: within it all clients arrive. ``has_poison``: the first one's request breaks the gang whenever it
    computes that. ``depth``: plans that a gang may have in flight."""

    seed: int
    num_clients: int
    max_tokens: int
    spread_s: float
    faults: tuple[Fault, ...]
    has_poison: bool = False
    depth: int = 1


_KINDS = [kind for kind in FaultKind if kind is not FaultKind.LEADER_HANGS]


def _instead(kind: FaultKind, hang: random.Random) -> FaultKind:
    """Some become a leader that hangs, by a draw of its own: runs without it are what they were before."""
    return FaultKind.LEADER_HANGS if hang.random() < 0.15 else kind


def draw_scenario(seed: int, num_replicas: int, num_front_ends: int) -> Scenario:
    """None to four faults, in order of time, while up to a dozen clients come. Where one of these breaks the gang,
    fewer faults: a replica may give up at its sixth break."""
    chance = random.Random(f"{seed} scenario")
    has_poison = chance.random() < 0.3
    num_faults = chance.choice([0, 1, 1, 1, 2, 2, 3, 4] if not has_poison else [0, 1, 1, 2])
    hang = random.Random(f"{seed} a leader hangs")
    faults = [
        Fault(
            at_s=chance.uniform(0.0, 4.0),
            kind=_instead(chance.choice(_KINDS), hang),
            replica=chance.randrange(num_replicas),
            front_end=chance.randrange(num_front_ends),
            duration_s=chance.choice([0.2, 1.0, 5.0, 25.0]),
        )
        for _ in range(num_faults)
    ]
    ordered = tuple(sorted(faults, key=lambda fault: fault.at_s))
    num_clients = chance.randint(1, 12)
    depth = chance.choice([1, 1, 2])
    return Scenario(seed, num_clients, 50, spread_s=4.0, faults=ordered, has_poison=has_poison, depth=depth)
