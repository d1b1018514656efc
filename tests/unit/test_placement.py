"""Placement of ranks on hosts: every promise of its docstring, on random clusters and on small ones by hand."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.control.placement import HostInfo, distance, may_choose_by_links, place_again, place_gangs
from engine.config import ParallelConfig
from engine.errors import LayoutError


def cluster_of(*num_slots: int) -> list[HostInfo]:
    return [HostInfo(f"node{index}", f"10.0.0.{index + 1}", slots) for index, slots in enumerate(num_slots)]


def names(gang: list[HostInfo]) -> str:
    """``001`` for two ranks on the first host and one on the second."""
    return "".join(host.node_id.removeprefix("node") for host in gang)


@pytest.mark.parametrize(
    ("slots", "parallel", "expected"),
    [
        ((8,), ParallelConfig(tp=2), "00"),
        ((2, 8, 8), ParallelConfig(tp=4), "1111"),
        # Equal hosts: the first of the list, which is the driver's own.
        ((4, 4), ParallelConfig(tp=2), "00"),
        # No host holds the gang, two hold a group each.
        ((2, 2, 2), ParallelConfig(tp=2, dp=2), "0011"),
        # The emptiest first, so two hosts suffice.
        ((2, 4, 4), ParallelConfig(tp=2, dp=4), "11112222"),
        # A stage stays together where a host can take it whole.
        ((3, 4, 4), ParallelConfig(tp=2, dp=2, pp=2), "11112222"),
        # Where none can, each of its groups does.
        ((2, 2, 4), ParallelConfig(tp=2, pp=2, dp=2), "22220011"),
    ],
)
def test_small_clusters(slots: tuple[int, ...], parallel: ParallelConfig, expected: str) -> None:
    (gang,) = place_gangs(parallel, cluster_of(*slots), on_gpus=False)
    assert names(gang) == expected


@pytest.mark.parametrize(
    ("slots", "parallel", "expected"),
    [
        ((1, 1, 1), ParallelConfig(tp=3), "012"),
        ((3, 3, 2), ParallelConfig(tp=2, pp=4), "22001110"),
        ((1, 3, 2), ParallelConfig(tp=4), "1112"),
    ],
)
def test_a_group_is_cut_only_when_asked(slots: tuple[int, ...], parallel: ParallelConfig, expected: str) -> None:
    with pytest.raises(LayoutError, match=r"on one host each, but there is room for \d only .*--tp-across-hosts"):
        place_gangs(parallel, cluster_of(*slots), on_gpus=False)
    (gang,) = place_gangs(parallel, cluster_of(*slots), on_gpus=False, tp_across_hosts=True)
    assert names(gang) == expected


def at(*topologies: str) -> list[HostInfo]:
    """Hosts of two slots each; ``a/1`` is rack 1 of zone a."""
    return [
        HostInfo(f"node{index}", f"10.0.0.{index + 1}", 2, topology=tuple(text.split("/")))
        for index, text in enumerate(topologies)
    ]


def test_distances_grow_with_the_levels_that_differ() -> None:
    near, rack, zone, unknown = at("a/1", "a/2", "b/1", "a")
    assert distance(near, near) == 0
    assert distance(near, replace(near, node_id="other")) == 1
    assert distance(near, rack) == 2
    assert distance(near, zone) == 3
    assert distance(near, unknown) == distance(unknown, near) == 2


@pytest.mark.parametrize(
    ("topologies", "pp", "expected"),
    [
        (["a/1", "b/1", "a/1", "b/1"], 2, "0022"),
        (["b/2", "a/1", "a/2", "a/1"], 2, "1133"),
        # Three stages in two zones: the border is crossed once, and racks are left as seldom as can be.
        (["b/1", "a/1", "b/1", "a/2", "a/1"], 3, "114433"),
        (["a/1", "b/1", "a/1", "b/1"], 4, "00221133"),
    ],
)
def test_stages_are_near_their_neighbours(topologies: list[str], pp: int, expected: str) -> None:
    (gang,) = place_gangs(ParallelConfig(tp=2, pp=pp), at(*topologies), on_gpus=False)
    assert names(gang) == expected


def test_measured_links_count_more_than_labels() -> None:
    hosts = at("a/1", "a/1", "b/1")
    links = {(a.node_id, b.node_id): 1e-3 for a, b in itertools.permutations(hosts, 2)}
    links["node0", "node2"] = links["node2", "node0"] = 1e-5
    (gang,) = place_gangs(ParallelConfig(tp=2, pp=2), hosts, on_gpus=False, links=links)
    assert names(gang) == "0022"
    # A link is as slow as its slower way.
    links["node2", "node0"] = 1.0
    (gang,) = place_gangs(ParallelConfig(tp=2, pp=2), hosts, on_gpus=False, links=links)
    assert names(gang) == "0011"


def test_groups_of_one_stage_are_near_each_other() -> None:
    hosts = at("", "", "")
    links = {(a.node_id, b.node_id): 1e-3 for a, b in itertools.permutations(hosts, 2)}
    links["node1", "node2"] = links["node2", "node1"] = 1e-5
    (gang,) = place_gangs(ParallelConfig(tp=2, dp=2), hosts, on_gpus=False, links=links)
    assert names(gang) == "1122"
    (gang,) = place_gangs(ParallelConfig(tp=4), hosts, on_gpus=False, tp_across_hosts=True, links=links)
    assert names(gang) == "1122"


def test_hosts_that_do_not_reach_each_other_are_not_joined() -> None:
    hosts = at("", "", "")
    links = {("node0", "node2"): 1.0, ("node2", "node0"): 1.0}
    (gang,) = place_gangs(ParallelConfig(tp=2, pp=2), hosts, on_gpus=False, links=links)
    assert names(gang) == "0022"


def test_links_are_measured_only_where_they_decide() -> None:
    labelled, bare = at("a/1", "a/2", "b/1"), cluster_of(2, 2, 2)

    def decide(hosts: list[HostInfo], parallel: ParallelConfig) -> bool:
        gangs = place_gangs(parallel, hosts, on_gpus=False)
        return may_choose_by_links(gangs, hosts, on_gpus=False)

    assert decide(bare, ParallelConfig(tp=2, pp=2))
    assert not decide(labelled, ParallelConfig(tp=2, pp=2)), "labels say what is near"
    assert decide(at("a", "a", "a"), ParallelConfig(tp=2, pp=2)), "a zone alone says nothing of racks"
    assert not decide(bare, ParallelConfig(tp=2)), "one host holds all"
    assert not decide(cluster_of(2, 2, 0), ParallelConfig(tp=2, pp=2)), "there is no other"


def test_ranks_that_lost_their_host_go_where_placement_would_have_put_them() -> None:
    hosts = at("a/1", "b/1", "a/1", "b/1")
    parallel = ParallelConfig(tp=2, pp=2)
    for kept in ({0: hosts[0], 1: hosts[0]}, {2: hosts[0], 3: hosts[0]}):
        full = [replace(host, used_cpu_slots=2 if host is hosts[0] else 0) for host in hosts]
        placed = place_again(parallel, full, kept, on_gpus=False)
        assert {rank: host.node_id for rank, host in placed.items()} == dict.fromkeys({0, 1, 2, 3} - set(kept), "node2")
        links = {(a.node_id, b.node_id): 1e-3 for a, b in itertools.permutations(hosts, 2)}
        links["node0", "node3"] = links["node3", "node0"] = 1e-5
        placed = place_again(parallel, full, kept, on_gpus=False, links=links)
        assert {host.node_id for host in placed.values()} == {"node3"}


def test_a_lost_group_is_not_cut_over_what_is_left_unless_asked() -> None:
    hosts, parallel = cluster_of(4, 4), ParallelConfig(tp=8)
    with pytest.raises(LayoutError, match=r"8 ranks have no host, and no host has room for a whole group of 8 \(.*: 4"):
        place_again(parallel, hosts, {}, on_gpus=False)
    placed = place_again(parallel, hosts, {}, on_gpus=False, tp_across_hosts=True)
    assert names([placed[rank] for rank in range(8)]) == "00001111"
    with pytest.raises(LayoutError, match="8 ranks have no host, and only 7 slots are free"):
        place_again(parallel, cluster_of(4, 3), {}, on_gpus=False, tp_across_hosts=True)


def test_what_a_stage_lacks_goes_onto_one_host_if_one_has_room() -> None:
    hosts = cluster_of(0, 3, 4)
    placed = place_again(ParallelConfig(tp=2, dp=3), hosts, {0: hosts[0], 1: hosts[0]}, on_gpus=False)
    assert {rank: host.node_id for rank, host in placed.items()} == dict.fromkeys((2, 3, 4, 5), "node2")


def test_replicas_do_not_share_slots() -> None:
    gangs = place_gangs(ParallelConfig(tp=2), cluster_of(3, 4), on_gpus=False, num_gangs=3)
    assert [names(gang) for gang in gangs] == ["00", "11", "11"]


def test_gpus_and_cpu_slots_are_counted_apart() -> None:
    hosts = [HostInfo("node0", "10.0.0.1", 8, num_gpus=0), HostInfo("node1", "10.0.0.2", 8, num_gpus=2)]
    (gang,) = place_gangs(ParallelConfig(tp=2), hosts, on_gpus=True)
    assert names(gang) == "11"


def test_the_refusal_counts_slots_and_names_the_remedy() -> None:
    hosts = [HostInfo("node0", "10.0.0.1", 4, used_cpu_slots=1), HostInfo("node1", "10.0.0.2", 4)]
    with pytest.raises(LayoutError) as refusal:
        place_gangs(ParallelConfig(tp=4, dp=2), hosts, on_gpus=False)
    assert str(refusal.value) == (
        "pp 1 × dp 2 × tp 4 needs 8 CPU slots, but only 7 of 8 are free (10.0.0.1: 3, 10.0.0.2: 4); "
        "raise --cpu-slots, add hosts or lower the degrees"
    )
    with pytest.raises(LayoutError, match=r"^3 replicas × .*needs 6 GPUs, but only 0 of 0 are free"):
        place_gangs(ParallelConfig(tp=2), hosts, on_gpus=True, num_gangs=3)
    with pytest.raises(LayoutError, match="there are no hosts"):
        place_gangs(ParallelConfig(), [], on_gpus=False)


hosts_strategy = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=6).map(
    lambda pairs: [
        HostInfo(f"node{index}", f"10.0.0.{index + 1}", total, used_cpu_slots=min(used, total))
        for index, (total, used) in enumerate(pairs)
    ]
)
parallel_strategy = st.builds(
    ParallelConfig, tp=st.sampled_from([1, 2, 3, 4, 8]), pp=st.integers(1, 3), dp=st.integers(1, 3)
)


@given(hosts=hosts_strategy, parallel=parallel_strategy, num_gangs=st.integers(1, 3))
def test_placed_exactly_when_there_is_room(hosts: list[HostInfo], parallel: ParallelConfig, num_gangs: int) -> None:
    free = {host.node_id: host.num_free(on_gpus=False) for host in hosts}
    if parallel.num_ranks * num_gangs > sum(free.values()):
        with pytest.raises(LayoutError):
            place_gangs(parallel, hosts, on_gpus=False, num_gangs=num_gangs)
        return
    gangs = place_gangs(parallel, hosts, on_gpus=False, num_gangs=num_gangs, tp_across_hosts=True)
    assert [len(gang) for gang in gangs] == [parallel.num_ranks] * num_gangs
    used = Counter(host.node_id for gang in gangs for host in gang)
    assert all(used[name] <= free[name] for name in used), "a slot was given out twice"
    assert gangs == place_gangs(parallel, hosts, on_gpus=False, num_gangs=num_gangs, tp_across_hosts=True)


@given(hosts=hosts_strategy, parallel=parallel_strategy)
def test_spread_only_when_needed(hosts: list[HostInfo], parallel: ParallelConfig) -> None:
    free = {host.node_id: host.num_free(on_gpus=False) for host in hosts}
    assume(parallel.num_ranks <= sum(free.values()))
    (gang,) = place_gangs(parallel, hosts, on_gpus=False, tp_across_hosts=True)
    if max(free.values()) >= parallel.num_ranks:
        assert len(set(gang)) == 1
    groups = [gang[start : start + parallel.tp] for start in range(0, len(gang), parallel.tp)]
    # As many groups are whole as the hosts can hold whole, and the whole ones come first.
    num_whole = min(len(groups), sum(slots // parallel.tp for slots in free.values()))
    assert [len(set(group)) == 1 for group in groups] == [index < num_whole for index in range(len(groups))]
    for group in groups:
        # A cut group is still a run for each of its hosts.
        assert len(set(group)) == 1 + sum(left != right for left, right in itertools.pairwise(group))


@given(hosts=hosts_strategy, parallel=parallel_strategy, across=st.booleans(), data=st.data())
def test_a_repair_keeps_the_rules(
    hosts: list[HostInfo], parallel: ParallelConfig, across: bool, data: st.DataObject
) -> None:
    """Some hosts are lost under a gang, and others may have become fuller or emptier."""
    try:
        (gang,) = place_gangs(parallel, hosts, on_gpus=False, tp_across_hosts=across)
    except LayoutError:
        assume(False)
    lost = data.draw(st.sets(st.sampled_from([host.node_id for host in hosts]), max_size=len(hosts) - 1))
    free = {host.node_id: data.draw(st.integers(0, 8)) for host in hosts if host.node_id not in lost}
    living = {name: HostInfo(name, name, slots) for name, slots in free.items()}
    kept = {rank: living[host.node_id] for rank, host in enumerate(gang) if host.node_id not in lost}
    homeless = set(range(parallel.num_ranks)) - set(kept)
    num_places = sum(slots if across else slots // parallel.tp * parallel.tp for slots in free.values())
    if len(homeless) > num_places:
        with pytest.raises(LayoutError):
            place_again(parallel, list(living.values()), kept, on_gpus=False, tp_across_hosts=across)
        return
    placed = place_again(parallel, list(living.values()), kept, on_gpus=False, tp_across_hosts=across)
    assert set(placed) == homeless
    used = Counter(host.node_id for host in placed.values())
    assert all(used[name] <= free[name] for name in used)
    whole = kept | placed
    if not across:
        for first in range(0, parallel.num_ranks, parallel.tp):
            assert len({whole[rank].node_id for rank in range(first, first + parallel.tp)}) == 1
