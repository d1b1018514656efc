"""Who relays on a host that is not the leader's."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from engine.executor.worker_config import WorkerConfig
from tests.support.hosted_gang import small_plan

LEADER = "10.0.0.1"
ENDPOINTS = GangEndpoints(LEADER, "unix:@leader", f"tcp:{LEADER}:7000", "secret")


def configs_of(hosts: list[str], loaded: set[int]) -> list[WorkerConfig]:
    plan = small_plan("m", tensor_parallel_size=len(hosts))
    placed = [PlacedRank(rank, host) for rank, host in enumerate(hosts)]
    return worker_configs(plan, placed, ENDPOINTS, LEADER, 6000, epoch=3, loaded=loaded)


def test_a_survivor_relays_and_not_the_newcomer_beside_it() -> None:
    hosts = [LEADER, "10.0.0.2", "10.0.0.2", "10.0.0.2"]
    assert [config.rank for config in configs_of(hosts, {0, 2, 3}) if config.relay] == [2]
    assert [config.rank for config in configs_of(hosts, set()) if config.relay] == [1]
    assert [config.rank for config in configs_of(hosts, {0}) if config.relay] == [1]


@given(
    st.lists(st.sampled_from([LEADER, "10.0.0.2", "10.0.0.3"]), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_each_other_host_has_one_relay_to_which_all_its_ranks_connect(hosts: list[str], loaded: set[int]) -> None:
    configs = configs_of(hosts, loaded)
    for host in set(hosts):
        local = [config for config in configs if hosts[config.rank] == host]
        relays = [config for config in local if config.relay is not None]
        assert len({config.channel_address for config in local}) == 1
        if host == LEADER:
            assert not relays and local[0].channel_address == ENDPOINTS.local
            continue
        (relay,) = relays
        assert relay.relay is not None and relay.relay.leader_address == ENDPOINTS.remote
        assert list(relay.relay.ranks) == [config.rank for config in local]
        assert relay.rank in loaded or not loaded & {config.rank for config in local}
    others = {config.channel_address for config in configs if hosts[config.rank] != LEADER}
    assert len(others) == len(set(hosts) - {LEADER})
