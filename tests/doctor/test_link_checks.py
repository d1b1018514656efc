"""Checks of links on planted measurements, the price of a link, and who measures when."""

import itertools
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.doctor.check_links import (
    check_exchange_link,
    check_links,
    check_pipeline_links,
    check_tensor_parallel_link,
)
from cluster.doctor.facts import LinkFacts
from cluster.doctor.finding import Level
from cluster.doctor.rounds import measuring_rounds
from cluster.plan.link_cost import (
    Link,
    StepTraffic,
    expert_exchange_traffic,
    predicted_loss,
    tensor_parallel_traffic,
)
from cluster.replica.model_source import ModelSource
from engine.model_config import ModelConfig

HOSTS = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
PAIRS = list(itertools.combinations(range(4), 2))


def good(first: int, second: int) -> LinkFacts:
    return LinkFacts(first, second, "gloo", 200e-6, 1e9, 50e-6, 1.2e9, 0.0)


def judged(pair: tuple[int, int], **planted: object) -> list[tuple[str, str, Level]]:
    """What is not well when one of six links has a fault."""
    links = [msgspec.structs.replace(good(*each), **(planted if each == pair else {})) for each in PAIRS]
    found = list(check_links(links, HOSTS))
    assert all(finding.remedy for finding in found if finding.level is not Level.OK)
    return [(finding.check, finding.where, finding.level) for finding in found if finding.level is not Level.OK]


WHERE = "rank 1 → rank 2 (10.0.0.2 → 10.0.0.3)"


@pytest.mark.parametrize(
    ("planted", "check", "level"),
    [
        ({"channel_bytes_per_s": 2e6}, "bandwidth", Level.FAIL),
        ({"channel_bytes_per_s": 60e6}, "bandwidth", Level.WARN),
        # Good by itself, and a quarter of what the others carry.
        ({"channel_bytes_per_s": 0.2e9}, "bandwidth", Level.WARN),
        ({"channel_s": 10e-3}, "latency", Level.WARN),
        ({"channel_s": 80e-3}, "latency", Level.FAIL),
        ({"channel_s": 0.9e-3}, "latency", Level.WARN),
        ({"lost_share": 0.004}, "loss", Level.WARN),
        ({"lost_share": 0.02}, "loss", Level.FAIL),
        ({"error": "timed out"}, "link", Level.FAIL),
    ],
)
def test_the_one_bad_link_is_named(planted: dict[str, object], check: str, level: Level) -> None:
    assert judged((1, 2), **planted) == [(check, WHERE, level)]


def test_good_links_are_well() -> None:
    assert judged((1, 2)) == []


def test_a_slow_link_costs_a_tensor_parallel_group_what_the_formula_says() -> None:
    links = [good(0, 1), msgspec.structs.replace(good(0, 2), collective_s=10e-3)]
    traffic = StepTraffic(num_collectives=65, num_bytes=0)
    hosts = ["a", "b", "c"]
    assert list(check_tensor_parallel_link([range(2)], links[:1], ["a", "a"], traffic, 0.01)) == [], "inside a host"
    (bad,) = check_tensor_parallel_link([range(3)], links, hosts, traffic, step_s=0.01)
    # 65 × 10 ms = 650 ms beside 10 ms.
    assert (bad.level, bad.where) == (Level.WARN, "rank 0 → rank 2 (a → c)")
    assert bad.value.startswith("98% of a decode step would be lost: 65 collectives of 10.00 ms")
    (fine,) = check_tensor_parallel_link([range(2)], links[:1], hosts, traffic, step_s=1.0)
    assert fine.level is Level.OK


def test_stages_are_priced_by_the_slowest_link_of_each_boundary() -> None:
    links = [good(*pair) for pair in PAIRS]
    # Ranks 0, 1 are a stage, 2, 3 the next: 0 → 2 and 1 → 3 are neighbours; the way of 0 → 3 is nobody's.
    slow = {(1, 3): 10e-3, (0, 3): 1.0}
    links = [msgspec.structs.replace(link, channel_s=slow.get((link.first, link.second), 50e-6)) for link in links]
    (bad,) = check_pipeline_links(range(4), 2, 2, links, HOSTS, row_bytes=0, stage_s=10e-3)
    # 5 ms over and back beside twice 10 ms: a third is lost.
    assert (bad.level, bad.where) == (Level.WARN, "rank 1 → rank 3 (10.0.0.2 → 10.0.0.4)")
    assert bad.value.startswith("33% of the throughput of 2 micro-batches would be lost: a token takes 10.00 ms more")
    (hidden,) = check_pipeline_links(range(4), 2, 3, links, HOSTS, row_bytes=0, stage_s=10e-3)
    assert hidden.level is Level.OK and hidden.value.startswith("0% ")
    inside = [msgspec.structs.replace(link, channel_s=None, channel_bytes_per_s=None) for link in links]
    assert list(check_pipeline_links(range(4), 2, 2, inside, HOSTS, row_bytes=0, stage_s=10e-3)) == []


def test_the_second_gangs_stages_are_priced_by_its_own_links() -> None:
    links = [msgspec.structs.replace(good(*pair), channel_s=10e-3 if pair == (2, 3) else 50e-6) for pair in PAIRS]
    found = [
        finding
        for gang in (range(2), range(2, 4))
        for finding in check_pipeline_links(gang, 1, 2, links, HOSTS, row_bytes=0, stage_s=10e-3)
    ]
    assert [(each.level, each.where.partition(" (")[0]) for each in found] == [
        (Level.OK, "rank 0 → rank 1"),
        (Level.WARN, "rank 2 → rank 3"),
    ]
    assert found[1].value.startswith("33% of the throughput of 2 micro-batches would be lost")


def test_ranks_that_exchange_tokens_are_priced_over_the_whole_stage() -> None:
    links = [good(0, 1), msgspec.structs.replace(good(0, 2), collective_s=10e-3)]
    traffic = StepTraffic(num_collectives=16, num_bytes=0)
    (bad,) = check_exchange_link([range(3)], links, HOSTS, traffic, step_s=0.04)
    assert (bad.level, bad.check, bad.where.partition(" (")[0]) == (
        Level.WARN, "exchange of tokens over", "rank 0 → rank 2"
    )  # fmt: skip
    assert bad.value.startswith("80% of a decode step would be lost: 16 exchanges of 10.00 ms")


def test_a_token_is_sent_once_to_a_rank_whatever_experts_it_has_there() -> None:
    model = ModelConfig.from_directory(ModelSource("remuda-tiny").directory())
    mixtures = [layer.moe for layer in model.layers if layer.moe]
    row_bytes = model.hidden_size * 4
    # Of 64 tokens of one rank half go to the other, where one expert is chosen for each, and as many come back.
    assert {moe.num_experts_per_token for moe in mixtures} == {1}
    once = expert_exchange_traffic(model, 2, 1, 128, 4)
    assert once == StepTraffic(2 * len(mixtures), 2 * len(mixtures) * 32 * row_bytes)
    layers = tuple(
        replace(layer, moe=layer.moe and replace(layer.moe, num_experts_per_token=2)) for layer in model.layers
    )
    twice = expert_exchange_traffic(replace(model, layers=layers), 2, 1, 128, 4)
    assert twice.num_bytes == once.num_bytes * 3 // 2


def test_traffic_of_a_step_from_shapes() -> None:
    model = ModelConfig.from_directory(ModelSource("remuda-tiny").directory())
    traffic = tensor_parallel_traffic(model, tp=4, ranks_per_host=2, num_tokens=3, bytes_per_number=4)
    assert traffic.num_collectives == 2 * model.num_layers + 1
    # Each of the two ranks here sends every row to the two elsewhere.
    assert traffic.num_bytes == traffic.num_collectives * 4 * 3 * model.hidden_size * 4
    assert StepTraffic(10, 10**6).seconds(Link(1e-3, 1e8)) == pytest.approx(0.02)
    assert predicted_loss(0.02, 0.02) == 0.5


@given(st.integers(1, 5), st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=10))
def test_every_pair_of_a_gang_measures_once_and_no_host_twice_at_a_time(size: int, hosts: list[str]) -> None:
    gangs = [range(first, min(first + size, len(hosts))) for first in range(0, len(hosts), size)]
    rounds = measuring_rounds([[hosts[rank] for rank in gang] for gang in gangs])
    expected = [pair for gang in gangs for pair in itertools.combinations(gang, 2)]
    assert sorted(itertools.chain(*rounds)) == expected
    for pairs in rounds:
        used = [host for pair in pairs for host in {hosts[rank] for rank in pair}]
        assert len(used) == len(set(used))


def test_four_hosts_take_three_rounds() -> None:
    assert [len(pairs) for pairs in measuring_rounds([HOSTS])] == [2, 2, 2]
