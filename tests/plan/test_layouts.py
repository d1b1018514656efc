"""Layouts: legal, each once, placeable as placement places them, the preferred first."""

import pytest

from cluster.control.placement import HostInfo, place_gangs
from cluster.plan.devices import Machines, parse_machines
from cluster.plan.layouts import Degrees, candidates, exchanging, host_of, larger, num_crossings, ranks_beside
from engine.config import Determinism, ParallelConfig
from engine.errors import InvalidOption
from engine.model_config import ModelConfig, validate_layout
from tests.plan.models import config_of

DENSE = ModelConfig.from_hf(config_of("Llama-3.1-8B"))
MIXTURE = ModelConfig.from_hf(config_of("Qwen3-30B-A3B"))


@pytest.mark.parametrize("gpus", ["1xH100-80", "6xH100-80", "16xH100-80", "2x4xH100-80", "3x2xH100-80"])
@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_all_are_legal_and_placeable(model: ModelConfig, gpus: str) -> None:
    machines = parse_machines(gpus)
    exchanged = list(exchanging(model, machines, Degrees()))
    assert bool(exchanged) == (model is MIXTURE and machines.num_devices > 1)
    assert all(layout.dp > 1 for layout in exchanged)
    layouts = [*candidates(model, machines, Degrees()), *exchanged]
    assert len(set(layouts)) == len(layouts)
    hosts = [HostInfo(str(i), f"10.0.0.{i}", 0, machines.per_host) for i in range(machines.num_hosts)]
    for layout in layouts:
        validate_layout(model, layout)
        ours = [host_of(rank, layout, machines) for rank in range(layout.num_ranks)]
        assert max(ours) < machines.num_hosts
        assert all(ours.count(host) <= machines.per_host for host in ours)
        placed = place_gangs(layout, hosts, on_gpus=True, tp_across_hosts=layout.tp > machines.per_host)[0]
        if layout.tp <= machines.per_host:
            for first in range(0, layout.num_ranks, layout.tp):
                assert len({ours[rank] for rank in range(first, first + layout.tp)}) == 1
                assert len({placed[rank].address for rank in range(first, first + layout.tp)}) == 1


def test_the_preferred_order() -> None:
    first, second, *_ = candidates(DENSE, parse_machines("16xH100-80"), Degrees())
    assert (first, second) == (ParallelConfig(tp=8, pp=2), ParallelConfig(tp=4, pp=4))
    assert ParallelConfig(tp=16) not in candidates(DENSE, parse_machines("2x6xH100-80"), Degrees())
    first, second, *_ = candidates(MIXTURE, parse_machines("8xH100-80"), Degrees())
    assert (first, second) == (ParallelConfig(tp=8, ep=8), ParallelConfig(tp=8, ep=4))


def test_fixed_degrees_are_kept() -> None:
    machines = parse_machines("8xH100-80")
    found = list(candidates(MIXTURE, machines, Degrees(tp=2, dp=2, ep=4)))
    assert found == [ParallelConfig(tp=2, dp=2, pp=2, ep=4), ParallelConfig(tp=2, dp=2, pp=1, ep=4)]
    assert list(candidates(DENSE, machines, Degrees(tp=3))) == []


def test_attention_replicas_fill_the_devices_with_the_most_expert_parallelism() -> None:
    found = list(exchanging(MIXTURE, parse_machines("8xH100-80"), Degrees()))
    assert found[:3] == [ParallelConfig(tp=4, dp=2, ep=8), ParallelConfig(tp=2, dp=4, ep=8), ParallelConfig(dp=8, ep=8)]
    assert ParallelConfig(tp=2, pp=2, dp=2, ep=4) in found
    assert list(exchanging(MIXTURE, parse_machines("8xH100-80"), Degrees(tp=8))) == []
    # 128 experts and their width of 768 divide by three nowhere but in the width.
    assert list(exchanging(MIXTURE, parse_machines("3xH100-80"), Degrees(tp=1, pp=1))) == [ParallelConfig(dp=3)]


def test_what_crosses_hosts() -> None:
    machines = parse_machines("2x4xH100-80")
    assert (
        ranks_beside(ParallelConfig(tp=4, dp=2), machines) == 4
        and num_crossings(ParallelConfig(tp=4, dp=2), machines) == 0
    )
    assert ranks_beside(ParallelConfig(tp=2, dp=2, pp=2), machines) == 0
    assert num_crossings(ParallelConfig(tp=2, dp=2, pp=2), machines) == 1
    # Stages of four ranks on hosts of six: the second stage lies on both.
    assert ranks_beside(ParallelConfig(tp=2, dp=2, pp=3), parse_machines("2x6xH100-80")) == 2


def test_more_machines() -> None:
    sizes = [(machines.num_hosts, machines.per_host) for machines in larger(parse_machines("2xH100-80"))]
    assert sizes[:4] == [(1, 4), (1, 8), (2, 8), (3, 8)]
    assert next(larger(Machines(parse_machines("1xT4-16").device, 2, 4))).num_devices == 12


def test_deterministic_mode_has_fewer() -> None:
    """Llama 3.1 8B has 32 heads, and widths that 8 divides: sums are made in 8 parts."""
    machines = parse_machines("16xH100-80")
    free = {(layout.tp, layout.pp) for layout in candidates(DENSE, machines, Degrees())}
    strict = list(candidates(DENSE, machines, Degrees(determinism=Determinism.D2)))
    assert {(layout.tp, layout.pp) for layout in strict} == {(tp, pp) for tp, pp in free if tp in (1, 2, 4, 8)}
    assert {(layout.determinism, layout.num_shards) for layout in strict} == {(Determinism.D2, 8)}
    assert not list(candidates(DENSE, machines, Degrees(tp=16, determinism=Determinism.D2)))
    with pytest.raises(InvalidOption, match="copies"):
        moving = Degrees(ep=4, num_redundant_experts=4, balances_experts=True, determinism=Determinism.D1)
        list(candidates(MIXTURE, machines, moving))
