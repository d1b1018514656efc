"""How layers are divided among stages and KV groups, against trying everything, and for released models."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ParallelConfig
from engine.errors import LayoutError
from engine.kv_groups import num_layer_slots
from engine.model_config import ModelConfig, kv_groups, stage_layers
from engine.parallel.mesh import Mesh
from engine.stages import divide_layers, num_groups_of_kinds

MODELS = Path(__file__).parents[1] / "data" / "models"


def unevenness(parts: Sequence[range], costs: Sequence[int], first_extra: int, last_extra: int) -> int:
    sums = [sum(costs[i] for i in part) for part in parts]
    sums[0] += first_extra
    sums[-1] += last_extra
    return sum(total**2 for total in sums)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 20), st.integers(0, 20), st.data())
def test_no_division_is_more_even(costs: list[int], first_extra: int, last_extra: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    found = divide_layers(tuple(costs), first_extra, last_extra, num_stages)
    assert [i for part in found for i in part] == list(range(len(costs))) and all(found)
    best = min(
        unevenness([range(a, b) for a, b in itertools.pairwise((0, *cuts, len(costs)))], costs, first_extra, last_extra)
        for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1)
    )
    assert unevenness(found, costs, first_extra, last_extra) == best


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(any), min_size=1, max_size=4))
def test_no_groups_take_less_memory_where_it_is_tightest(stages: list[tuple[int, int]]) -> None:
    def worst(num_groups: Sequence[int]) -> int:
        return max(
            sum(num_groups) * max(-(-n // groups) for n, groups in zip(stage, num_groups, strict=True) if groups)
            for stage in stages
        )

    kinds = list(zip(*stages, strict=True))
    every = itertools.product(*(range(1, max(kind) + 1) if max(kind) else [0] for kind in kinds))
    assert worst(num_groups_of_kinds(stages)) == min(map(worst, every))


def model(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((MODELS / f"{name}.json").read_text()))


def test_the_embedding_and_the_head_count() -> None:
    """Each is as heavy as two and a half layers."""
    assert [len(layers) for layers in stage_layers(model("Llama-3.1-8B"), 4)] == [7, 9, 9, 7]
    assert [len(layers) for layers in stage_layers(model("Llama-3.1-405B"), 2)] == [63, 63]


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_scout_keeps_no_more_in_stages_than_in_one(pp: int) -> None:
    """12 full layers and 36 chunked: one group of the former, three of the latter, in every stage."""
    scout = model("Llama-4-Scout-17B-16E-Instruct")
    groups = kv_groups(scout, pp)
    assert [group.chunk_size for group in groups] == [None, 8192, 8192, 8192]
    assert sorted(layer for group in groups for layer in group.layers) == list(range(48))
    for rank in range(pp):
        mesh = Mesh(ParallelConfig(pp=pp), rank)
        own = mesh.kv_groups(scout)
        assert sorted(layer for group in own for layer in group.layers) == list(mesh.layers(scout))
        assert num_layer_slots(own) == 12 // pp


def test_what_does_not_divide_prints_the_product() -> None:
    with pytest.raises(LayoutError, match=r"ep=3 does not divide 2 × 4 = 8 \(pp 2 × dp 2 × tp 4 = 16 ranks\)"):
        ParallelConfig(pp=2, dp=2, tp=4, ep=3)
