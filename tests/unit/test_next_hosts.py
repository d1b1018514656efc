"""Whose slots count when ranks have lost their hosts."""

import pytest

from cluster.control.next_hosts import choose_hosts, with_held
from cluster.control.placement import HostInfo
from cluster.replica.events import LaunchConfig
from engine.errors import LayoutError
from tests.support.hosted_gang import small_plan

HERE, THERE, FAR = (HostInfo(f"node{number}", f"10.0.0.{number}", 2, used_cpu_slots=2) for number in (1, 2, 3))


def config(**changes: object) -> LaunchConfig:
    plan = small_plan("m", tensor_parallel_size=2, pipeline_parallel_size=2)
    values: dict[str, object] = {"num_replicas": 1, "address": None, "cpu_slots": 2, "secret": ""}
    return LaunchConfig(plan, **(values | changes))  # type: ignore[arg-type]


def test_slots_held_for_the_lost_ranks_are_theirs() -> None:
    kept = {0: HERE.address, 1: HERE.address}
    with pytest.raises(LayoutError, match="2 ranks have no host, and only 0 slots are free"):
        choose_hosts(config(), [HERE, THERE], kept)
    held = {THERE.address: 2, FAR.address: 1}
    hosts = [with_held(host, held) for host in (HERE, FAR, THERE)]
    assert choose_hosts(config(), hosts, kept) == {2: THERE.address, 3: THERE.address}
    # Ray has not reserved them again yet: a slot is not counted twice.
    assert with_held(HostInfo("node4", "10.0.0.2", 2), held).num_free(on_gpus=False) == 2


def test_the_options_of_the_first_placement_hold() -> None:
    free = [HostInfo(f"node{number}", f"10.0.0.{number}", slots) for number, slots in enumerate((0, 1, 2, 2, 1))]
    kept = {0: free[0].address, 1: free[0].address}
    near = choose_hosts(config(links=(("node0", "node3", 1.0), ("node3", "node0", 1.0))), free, kept)
    assert set(near.values()) == {free[3].address}
    singles = [free[0], free[1], free[4]]
    with pytest.raises(LayoutError, match="no host has room for a whole group of 2"):
        choose_hosts(config(), singles, kept)
    cut = choose_hosts(config(tp_across_hosts=True), singles, kept)
    assert set(cut.values()) == {free[1].address, free[4].address}


def test_a_host_that_is_lost_meanwhile_is_noticed() -> None:
    with pytest.raises(LayoutError, match=r"10\.0\.0\.1 was lost too"):
        choose_hosts(config(), [THERE], {0: HERE.address, 1: HERE.address})
