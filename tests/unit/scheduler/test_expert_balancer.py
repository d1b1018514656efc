"""The balancer alone: told what ranks counted and answered, by a clock of the test's own."""

import random
from dataclasses import replace

import pytest

from engine.messages import (
    DropExperts,
    ExpertChange,
    ExpertLoads,
    ExpertOutcome,
    StageExperts,
    StepPlan,
    StepResult,
    UseExperts,
)
from engine.parallel.expert_balance import ExpertPlacement, imbalance
from engine.scheduler.expert_balancer import BalanceConfig, ExpertBalancer
from engine.scheduler.expert_layout import ExpertLayout

NUM_EXPERTS, NUM_RANKS, NUM_SLOTS = 16, 4, 5
SKEWED = [1.0 / (rank + 1) for rank in range(NUM_EXPERTS)]
LAYOUT = ExpertLayout(
    layers=((1, 3),),
    num_experts=NUM_EXPERTS,
    num_slots=NUM_SLOTS,
    ranks_per_host=((2, 2),),
    ranks_per_stage=NUM_RANKS,
    expert_tp=1,
    expert_bytes=1_000_000,
    expert_share=0.8,
    moves=True,
)


class Bed:
    """Ranks that count and read as they are told."""

    def __init__(self, layout: ExpertLayout = LAYOUT, config: BalanceConfig = BalanceConfig()) -> None:
        self.now_s = 0.0
        self.balancer = ExpertBalancer(layout, lambda: self.now_s, config)
        self.held = {layer: self._linear() for layer in (1, 3)}
        self.staged: dict[int, tuple[int, ExpertPlacement]] = {}
        self.changes: list[ExpertChange] = []
        self.table = 0

    @staticmethod
    def _linear() -> ExpertPlacement:
        return ExpertPlacement(
            tuple(tuple((rank * 4 + slot) % NUM_EXPERTS for slot in range(NUM_SLOTS)) for rank in range(NUM_RANKS))
        )

    def step(
        self, loads: list[float] | None = None, *, may_move: bool = True, error: str = "", reads: bool = True
    ) -> None:
        """A second passes; each rank answers at once what it was told to read."""
        reports = [] if loads is None else [self._report(rank, loads) for rank in range(NUM_RANKS)]
        changes = self.balancer.take_changes(may_move=may_move) if self.balancer.has_changes else []
        plan = StepPlan(0, 0, [], experts=changes, expert_table=self.balancer.table)
        outcomes = []
        for change in changes:
            self.changes.append(change)
            if isinstance(change, StageExperts):
                placement = ExpertPlacement(tuple(map(tuple, change.placement.slots)))
                placement.check(NUM_EXPERTS)
                self.staged[change.move] = change.placement.layer, placement
                ranks = range(NUM_RANKS) if reads else range(NUM_RANKS - 1)
                outcomes = [ExpertOutcome(rank, change.move, 1_000_000, 0.01) for rank in ranks]
                if error:
                    outcomes[2] = ExpertOutcome(2, change.move, error=error)
            elif isinstance(change, UseExperts):
                layer, placement = self.staged.pop(change.move)
                self.held[layer] = placement
                self.table += 1
            else:
                del self.staged[change.move]
        assert plan.expert_table == self.table
        self.now_s += 1.0
        self.balancer.returned(plan, StepResult(0, 0, 0, expert_outcomes=outcomes, expert_loads=reports))

    def _report(self, rank: int, loads: list[float]) -> ExpertLoads:
        """Copies share their expert's pairs."""
        by_layer = []
        for placement in self.held.values():
            counts = [len(places) for places in placement.copies(NUM_EXPERTS)]
            by_layer.append([int(10_000 * loads[expert] / counts[expert]) for expert in placement.slots[rank]])
        return ExpertLoads(rank, by_layer, 10, 900_000)

    def of_kind(self, kind: type[ExpertChange]) -> list[ExpertChange]:
        return [change for change in self.changes if isinstance(change, kind)]


def test_a_skewed_load_is_balanced_layer_by_layer_and_then_left_alone() -> None:
    bed = Bed()
    for _ in range(60):
        bed.step(SKEWED)
    assert all(imbalance(placement, SKEWED) <= 1.15 for placement in bed.held.values())
    stats = bed.balancer.stats()
    assert stats.num_moves == 2 and stats.num_failed_moves == 0 and stats.imbalance <= 1.15
    assert len(bed.of_kind(StageExperts)) == 2, "nothing more is to be gained"
    assert {each.layer for each in bed.balancer.placements()} == {1, 3}


def test_each_layers_experts_are_shown_with_what_they_had_lately() -> None:
    never = Bed(config=BalanceConfig(interval_s=1e9))
    counts = [len(places) for places in Bed._linear().copies(NUM_EXPERTS)]
    each_step = [int(10_000 * load / count) * count for load, count in zip(SKEWED, counts, strict=True)]
    for step in range(1, 4):
        never.step(SKEWED)
        expected = tuple(step * pairs for pairs in each_step)
        assert never.balancer.stats().layers == {1: expected, 3: expected}
    often = Bed()
    for _ in range(200):
        often.step(SKEWED)
    assert often.of_kind(UseExperts)
    for pairs in often.balancer.stats().layers.values():
        assert len(pairs) == NUM_EXPERTS and list(pairs) == sorted(pairs, reverse=True), "also where they have moved"
        assert pairs[0] < 50 * each_step[0], "not since the beginning"


def test_an_even_load_moves_nothing() -> None:
    """Spare slots are copies of some experts from the beginning, so what is even is the load of a slot."""
    bed = Bed(config=BalanceConfig(least_gain=0.6))
    for _ in range(60):
        bed.step([1.0] * NUM_EXPERTS)
    assert bed.changes == [] and bed.balancer.stats().imbalance < 1.6


def test_a_move_that_costs_more_than_it_brings_is_not_made() -> None:
    bed = Bed(config=BalanceConfig(horizon_s=1e-6))
    for _ in range(60):
        bed.step(SKEWED)
    assert bed.changes == []


def test_a_rank_that_cannot_read_leaves_the_table_and_is_asked_again_later() -> None:
    bed = Bed()
    before = dict(bed.held)
    for _ in range(40):
        bed.step(SKEWED, error="CheckpointError: gone")
    assert bed.held == before and bed.staged == {} and bed.balancer.placements() == []
    assert (len(bed.of_kind(StageExperts)), len(bed.of_kind(DropExperts))) == (1, 1)
    assert bed.balancer.stats().num_failed_moves == 1
    for _ in range(90):
        bed.step(SKEWED)
    assert bed.balancer.stats().num_moves == 2


def test_a_rank_that_never_answers_is_given_up() -> None:
    bed = Bed()
    for _ in range(700):
        bed.step(SKEWED, reads=False)
    assert bed.balancer.stats().num_failed_moves == 1 and len(bed.of_kind(UseExperts)) == 0
    assert bed.staged == {} or len(bed.of_kind(StageExperts)) == 2


def test_nothing_moves_beside_an_adapter() -> None:
    bed = Bed()
    for _ in range(60):
        bed.step(SKEWED, may_move=False)
    assert bed.changes == []


def test_an_adapter_that_comes_meanwhile_ends_a_move() -> None:
    bed = Bed()
    while not bed.of_kind(StageExperts):
        bed.step(SKEWED)
    bed.step(SKEWED, may_move=False)
    assert isinstance(bed.changes[-1], DropExperts) and bed.balancer.table == 0


def test_a_new_epoch_begins_with_what_the_last_plan_used() -> None:
    bed = Bed()
    while not bed.of_kind(UseExperts):
        bed.step(SKEWED)
    while len(bed.of_kind(StageExperts)) < 2:
        bed.step(SKEWED)
    was_moving = bed.balancer.is_moving
    bed.balancer.restart()
    assert was_moving and not bed.balancer.is_moving and bed.balancer.table == 0
    (placement,) = bed.balancer.placements()
    assert tuple(map(tuple, placement.slots)) == bed.held[placement.layer].slots


def test_hosts_of_ranks_that_moved_count_from_the_next_epoch_on() -> None:
    """Two hot experts of one host: copies go to the other host's ranks as the hosts are now."""
    loads = [8.0] * 4 + [1.0] * 12

    def first_placement(*hosts: tuple[int, ...]) -> ExpertPlacement:
        bed = Bed()
        for ranks_per_host in hosts:
            bed.balancer.restart()
            bed.balancer.set_layout(replace(LAYOUT, ranks_per_host=(ranks_per_host,)))
        while not bed.of_kind(UseExperts):
            bed.step(loads)
        return bed.held[1] if bed.held[1] != Bed._linear() else bed.held[3]

    moved = first_placement((2, 2), (1, 3))
    assert moved == first_placement((1, 3))
    assert moved != first_placement((2, 2))


@pytest.mark.parametrize("seed", range(5))
def test_any_loads_at_any_time(seed: int) -> None:
    """Ranks refuse adapters' and each other's bad moments; no table ever lacks an expert (``check`` in each step)."""
    rng = random.Random(seed)
    bed = Bed(config=BalanceConfig(interval_s=2.0, least_gain=0.0))
    for _ in range(300):
        loads = [rng.paretovariate(1.0) for _ in range(NUM_EXPERTS)] if rng.random() < 0.7 else None
        bed.step(loads, may_move=rng.random() < 0.9, error="no memory" if rng.random() < 0.02 else "")
        if rng.random() < 0.01:
            bed.balancer.restart()
            bed.staged.clear()
            bed.table = 0
    assert bed.balancer.stats().num_moves > 3
