"""Placement of experts: what must hold for every load, and how even it makes skewed ones."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.parallel.expert_balance import (
    ExpertPlacement,
    MoveCost,
    balanced_placement,
    imbalance,
    is_worth_moving,
    linear_placement,
    moves,
)

LOADS = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=40)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    """Loads, ranks of each host, slots of each rank."""
    loads = draw(LOADS)
    ranks_per_host = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    least = -(-len(loads) // sum(ranks_per_host))
    return loads, ranks_per_host, draw(st.integers(least, min(len(loads), least + 3)))


def zipf(num_experts: int, exponent: float, generator: random.Random) -> list[float]:
    loads = [1000.0 / (rank + 1) ** exponent for rank in range(num_experts)]
    generator.shuffle(loads)
    return loads


@given(clusters(), st.randoms(use_true_random=False))
def test_every_expert_is_present_and_no_load_is_lost(
    cluster: tuple[list[float], list[int], int], generator: random.Random
) -> None:
    loads, ranks_per_host, num_slots = cluster
    current = linear_placement(len(loads), sum(ranks_per_host), num_slots)
    current.check(len(loads))
    for _ in range(3):
        proposed = balanced_placement(loads, ranks_per_host, num_slots, current)
        proposed.check(len(loads))
        assert {len(experts) for experts in proposed.slots} == {num_slots}
        assert sum(proposed.rank_loads(loads)) == pytest.approx(sum(loads))
        assert balanced_placement(loads, ranks_per_host, num_slots, proposed) == proposed, "stable where loads are"
        current, loads = proposed, [generator.random() * 100 for _ in loads]


@given(clusters())
def test_moves_lead_from_one_placement_to_the_other(cluster: tuple[list[float], list[int], int]) -> None:
    loads, ranks_per_host, num_slots = cluster
    current = linear_placement(len(loads), sum(ranks_per_host), num_slots)
    proposed = balanced_placement(loads, ranks_per_host, num_slots, current)
    slots = [list(experts) for experts in current.slots]
    for rank, slot, expert in moves(current, proposed):
        assert slots[rank][slot] != expert
        slots[rank][slot] = expert
    assert ExpertPlacement(tuple(tuple(experts) for experts in slots)) == proposed


def test_a_thousand_random_placements_keep_every_expert() -> None:
    generator = random.Random(5)
    for _ in range(1000):
        num_experts = generator.choice([4, 8, 16, 24, 64, 128])
        ranks_per_host = [generator.randint(1, 4) for _ in range(generator.randint(1, 4))]
        least = -(-num_experts // sum(ranks_per_host))
        num_slots = min(num_experts, least + generator.randint(0, 2))
        loads = zipf(num_experts, generator.uniform(0.0, 1.5), generator)
        balanced_placement(loads, ranks_per_host, num_slots).check(num_experts)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ranks_per_host", "num_slots"), [([4], 5), ([2, 2], 5), ([1, 1, 1, 1], 6)])
def test_zipf_loads_are_spread_evenly(seed: int, ranks_per_host: list[int], num_slots: int) -> None:
    loads = zipf(16, 1.0, random.Random(seed))
    before = linear_placement(16, 4, num_slots)
    after = balanced_placement(loads, ranks_per_host, num_slots, before)
    assert imbalance(after, loads) <= 1.15
    assert imbalance(after, loads) <= imbalance(before, loads)


def test_the_hottest_expert_gets_the_spare_slots() -> None:
    loads = [100.0, 1.0, 1.0, 1.0]
    placement = balanced_placement(loads, [2, 2], 2)
    assert [len(places) for places in placement.copies(4)] == [4, 2, 1, 1]


def test_copies_of_a_hot_expert_are_on_different_hosts() -> None:
    placement = balanced_placement([90.0, 30.0, 20.0, 10.0, 10.0, 10.0], [2, 2], 2)
    hot = placement.copies(6)[0]
    assert len({rank // 2 for rank, _ in hot}) == 2


def test_a_move_must_pay() -> None:
    loads_per_s = [800.0, 800.0, 100.0, 100.0]
    current = ExpertPlacement(((0, 1), (2, 3)))
    proposed = balanced_placement(loads_per_s, [2], 2, current)
    assert imbalance(proposed, loads_per_s) == pytest.approx(1.0)
    cheap = MoveCost(expert_bytes=10**6, bytes_per_s=1e9, seconds_per_load=1e-4)
    assert is_worth_moving(current, proposed, loads_per_s, cheap)
    dear = MoveCost(expert_bytes=10**12, bytes_per_s=1e6, seconds_per_load=1e-4)
    assert not is_worth_moving(current, proposed, loads_per_s, dear)
    assert not is_worth_moving(proposed, proposed, loads_per_s, cheap)
    even = [1.0, 1.0, 1.0, 1.0]
    assert not is_worth_moving(current, proposed, even, cheap), "nothing is gained"


def test_no_load_is_no_imbalance() -> None:
    assert imbalance(linear_placement(8, 4, 2), [0.0] * 8) == 1.0
