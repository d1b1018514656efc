"""Which experts live on which ranks, as a pure function of how many tokens each expert gets.

After "EPLB" of DeepSeek-V3 (arXiv 2412.19437, section 3.4; deepseek-ai/EPLB): hot experts get copies, the copies are
spread first over hosts, then over each host's ranks, each time the heaviest first onto the lightest that has room.

E experts, R ranks, S slots on each rank (S × R ≥ E). A load is a number of tokens, in any unit.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertPlacement:
    """One layer's experts: ``slots[rank][slot]`` is an expert. Every expert is somewhere, none twice on one rank."""

    slots: tuple[tuple[int, ...], ...]

    def copies(self, num_experts: int) -> list[list[tuple[int, int]]]:
        """By expert the (rank, slot) places that hold it, in order of ranks."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for rank, experts in enumerate(self.slots):
            for slot, expert in enumerate(experts):
                found[expert].append((rank, slot))
        return found

    def rank_loads(self, loads: Sequence[float]) -> list[float]:
        """What each rank gets where an expert's tokens are shared equally by its copies."""
        num_copies = [len(places) for places in self.copies(len(loads))]
        return [sum(loads[expert] / num_copies[expert] for expert in experts) for experts in self.slots]

    def check(self, num_experts: int) -> None:
        """Asserts what the class promises."""
        assert {expert for experts in self.slots for expert in experts} == set(range(num_experts)), "an expert is lost"
        assert all(len(set(experts)) == len(experts) for experts in self.slots), "an expert is twice on one rank"
        assert len({len(experts) for experts in self.slots}) == 1, "ranks have different numbers of slots"


@dataclass(frozen=True)
class MoveCost:
    """What moving experts costs and what it brings.

    Attributes:
        expert_bytes: of one expert's weights in one layer, on one rank.
        bytes_per_s: at which a rank receives weights while it computes.
        seconds_per_load: of a rank's time for one unit of load in a layer.
        horizon_s: for how long the loads are trusted to stay as they are.
        slowdown: share of a step's time that is lost while weights move.
    """

    expert_bytes: int
    bytes_per_s: float
    seconds_per_load: float
    horizon_s: float = 60.0
    slowdown: float = 0.1


def linear_placement(num_experts: int, num_ranks: int, slots_per_rank: int) -> ExpertPlacement:
    """Experts in order, as a checkpoint has them; spare slots go to the experts that follow, in turn."""
    _check_room(num_experts, num_ranks, slots_per_rank)
    slots, start = [], 0
    for rank in range(num_ranks):
        end = num_experts * (rank + 1) // num_ranks
        slots.append(tuple((start + i) % num_experts for i in range(slots_per_rank)))
        start = end
    return ExpertPlacement(tuple(slots))


def balanced_placement(
    loads: Sequence[float], ranks_per_host: Sequence[int], slots_per_rank: int, current: ExpertPlacement | None = None
) -> ExpertPlacement:
    """The placement for these loads.

    Args:
        loads: [E], of one layer; none below 0.
        ranks_per_host: how many neighbouring ranks each host has; their sum is R.
        slots_per_rank: S. What S × R exceeds E by are copies.
        current: what there is; ranks of one host and slots of one rank are then named so that few experts move.
    """
    num_ranks = sum(ranks_per_host)
    _check_room(len(loads), num_ranks, slots_per_rank)
    num_copies = _num_copies(loads, num_ranks, slots_per_rank)
    shares = [load / count for load, count in zip(loads, num_copies, strict=True)]
    by_host = _pack(shares, num_copies, [num * slots_per_rank for num in ranks_per_host], ranks_per_host)
    slots: list[tuple[int, ...]] = []
    for copies, num_local in zip(by_host, ranks_per_host, strict=True):
        counts = [0] * len(loads)
        for expert in copies:
            counts[expert] += 1
        ranks = [tuple(sorted(rank)) for rank in _pack(shares, counts, [slots_per_rank] * num_local, [1] * num_local)]
        if current is not None:
            ranks = _named_alike(ranks, current.slots[len(slots) : len(slots) + num_local])
        slots += ranks
    return ExpertPlacement(tuple(slots))


def moves(current: ExpertPlacement, proposed: ExpertPlacement) -> list[tuple[int, int, int]]:
    """The (rank, slot, expert) whose weights must come from elsewhere."""
    return [
        (rank, slot, expert)
        for rank, (before, after) in enumerate(zip(current.slots, proposed.slots, strict=True))
        for slot, expert in enumerate(after)
        if before[slot] != expert
    ]


def is_worth_moving(
    current: ExpertPlacement, proposed: ExpertPlacement, loads_per_s: Sequence[float], cost: MoveCost
) -> bool:
    """Whether the seconds that a step's slowest rank saves within the horizon exceed those that the move takes."""
    rank_moves = [0] * len(current.slots)
    for rank, _, _ in moves(current, proposed):
        rank_moves[rank] += 1
    if not any(rank_moves):
        return False
    saved_per_s = max(current.rank_loads(loads_per_s)) - max(proposed.rank_loads(loads_per_s))
    move_s = max(rank_moves) * cost.expert_bytes / cost.bytes_per_s
    return saved_per_s * cost.seconds_per_load * cost.horizon_s > move_s * cost.slowdown


def imbalance(placement: ExpertPlacement, loads: Sequence[float]) -> float:
    """The most loaded rank's load ÷ the mean. 1.0 is perfect, and what no load at all gives."""
    rank_loads = placement.rank_loads(loads)
    mean = sum(rank_loads) / len(rank_loads)
    return max(rank_loads) / mean if mean else 1.0


def _check_room(num_experts: int, num_ranks: int, slots_per_rank: int) -> None:
    assert num_ranks * slots_per_rank >= num_experts, f"{num_experts} experts do not fit {num_ranks} × {slots_per_rank}"
    assert slots_per_rank <= num_experts, f"{slots_per_rank} slots cannot hold different ones of {num_experts} experts"


def _num_copies(loads: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[int]:
    """Each spare slot goes to the expert whose copies have most to do. A rank needs no second copy."""
    counts = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_ranks * slots_per_rank - len(loads)):
        _, expert = heapq.heappop(heap)
        counts[expert] += 1
        if counts[expert] < num_ranks:
            heapq.heappush(heap, (-loads[expert] / counts[expert], expert))
    return counts


def _pack(
    shares: Sequence[float], counts: Sequence[int], rooms: Sequence[int], limits: Sequence[int]
) -> list[list[int]]:
    """Put ``counts[expert]`` copies of each expert into bins.

    Args:
        shares: [E], load of one copy.
        rooms: of each bin; together exactly as many as there are copies.
        limits: of each bin, how many copies of one expert it may hold.
    """
    bins: list[list[int]] = [[] for _ in rooms]
    totals = [0.0] * len(rooms)
    for expert in sorted(range(len(shares)), key=lambda e: (-shares[e], e)):
        for _ in range(counts[expert]):
            fitting = [b for b in range(len(rooms)) if len(bins[b]) < rooms[b] and bins[b].count(expert) < limits[b]]
            if fitting:
                # Hosts differ in how many ranks they have, so what counts is the load of a slot.
                chosen = min(fitting, key=lambda b: (bins[b].count(expert), totals[b] / rooms[b], b))
            else:
                chosen = _make_room(bins, totals, shares, rooms, limits, expert)
            bins[chosen].append(expert)
            totals[chosen] += shares[expert]
    return bins


def _make_room(
    bins: list[list[int]],
    totals: list[float],
    shares: Sequence[float],
    rooms: Sequence[int],
    limits: Sequence[int],
    expert: int,
) -> int:
    """Only full bins can take ``expert``: move one of their experts, of the lightest, to a bin that has room."""
    _, source, target, moved = min(
        (shares[moved], source, target, moved)
        for source in range(len(bins))
        if bins[source].count(expert) < limits[source]
        for moved in set(bins[source])
        for target in range(len(bins))
        if len(bins[target]) < rooms[target] and bins[target].count(moved) < limits[target]
    )
    bins[source].remove(moved)
    bins[target].append(moved)
    totals[source] -= shares[moved]
    totals[target] += shares[moved]
    return source


def _named_alike(ranks: list[tuple[int, ...]], before: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The same sets of experts, given to the ranks that hold most of them already, each expert in its old slot."""
    pairs = sorted(
        (
            (-len(set(experts) & set(held)), old, new)
            for old, held in enumerate(before)
            for new, experts in enumerate(ranks)
        )
    )
    chosen: dict[int, tuple[int, ...]] = {}
    taken: set[int] = set()
    for _, old, new in pairs:
        if old not in chosen and new not in taken:
            chosen[old] = ranks[new]
            taken.add(new)
    return [_in_old_slots(chosen[old], held) for old, held in enumerate(before)]


def _in_old_slots(experts: tuple[int, ...], held: tuple[int, ...]) -> tuple[int, ...]:
    newcomers = iter(sorted(set(experts) - set(held)))
    return tuple(expert if expert in experts else next(newcomers) for expert in held)
