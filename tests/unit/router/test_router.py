"""Filter → score → pick, on tables of any shape."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Unavailable
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaTable
from cluster.router.router import NoReplica, default_router
from cluster.types import ReplicaInfo, ReplicaState


def replica(name: str, state: ReplicaState = ReplicaState.READY, running: int = 0, waiting: int = 0) -> ReplicaInfo:
    return ReplicaInfo(
        id=name,
        model="m",
        state=state,
        address=f"{name}:1",
        incarnation=1,
        max_model_len=64,
        max_num_seqs=8,
        block_size=16,
        num_blocks=9,
        num_running=running,
        num_waiting=waiting,
    )


def table_of(infos: list[ReplicaInfo], disconnected: Iterable[str] = ()) -> ReplicaTable:
    table = ReplicaTable()
    for info in infos:
        table.update(info)
    for name in disconnected:
        table.disconnect(name)
    return table


replicas = st.lists(
    st.builds(
        replica,
        name=st.text("abcdef", min_size=1, max_size=3),
        state=st.sampled_from(ReplicaState),
        running=st.integers(0, 4),
        waiting=st.integers(0, 4),
    ),
    unique_by=lambda info: info.id,
    max_size=6,
)
names = st.sets(st.text("abcdef", min_size=1, max_size=3), max_size=4)


def routes(table: ReplicaTable, query: RoutingQuery, count: int) -> list[str | None]:
    router = default_router(table)
    found: list[str | None] = []
    for _ in range(count):
        try:
            found.append(router.route(query))
        except NoReplica:
            found.append(None)
    return found


@given(infos=replicas, disconnected=names, tried=names)
def test_only_ready_connected_untried_replicas_are_picked(
    infos: list[ReplicaInfo], disconnected: set[str], tried: set[str]
) -> None:
    untried = [info for info in infos if info.id not in disconnected | tried]
    allowed = {info.id for info in untried if info.state is ReplicaState.READY}
    allowed = allowed or {info.id for info in untried if info.state is ReplicaState.REPAIRING}
    found = routes(table_of(infos, disconnected), RoutingQuery(tried=frozenset(tried)), 5)
    assert all(each in allowed for each in found) if allowed else set(found) == {None}


@given(infos=replicas, data=st.data())
def test_the_order_of_the_table_does_not_matter(infos: list[ReplicaInfo], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(infos))
    assert routes(table_of(infos), RoutingQuery(), 9) == routes(table_of(shuffled), RoutingQuery(), 9)


@given(infos=replicas)
def test_the_least_loaded_is_picked(infos: list[ReplicaInfo]) -> None:
    ready = [info for info in infos if info.state is ReplicaState.READY]
    ready = ready or [info for info in infos if info.state is ReplicaState.REPAIRING]
    (found,) = routes(table_of(infos), RoutingQuery(), 1)
    loads = {info.id: info.num_running + info.num_waiting for info in ready}
    assert found is None if not loads else loads[found or ""] == min(loads.values())


@given(loads=st.lists(st.integers(0, 5), min_size=1, max_size=5), count=st.integers(1, 40))
def test_requests_between_two_updates_level_the_load(loads: list[int], count: int) -> None:
    infos = [replica(f"r{index}", running=load) for index, load in enumerate(loads)]
    sent = Counter(routes(table_of(infos), RoutingQuery(), count))
    after = {info.id: info.num_running + sent[info.id] for info in infos}
    reached = [after[name or ""] for name in sent]
    assert max(reached) - min(after.values()) <= 1


def test_equals_take_turns() -> None:
    table = table_of([replica(name) for name in "cab"])
    router = default_router(table)
    found = []
    for _ in range(6):
        found.append(router.route(RoutingQuery()))
        for name in "abc":
            table.update(replica(name))
    assert found == ["a", "b", "c", "a", "b", "c"]


def test_an_update_forgets_what_was_sent_before_it() -> None:
    table = table_of([replica("a"), replica("b")])
    router = default_router(table)
    router.route(RoutingQuery())
    view = table.get("a")
    assert view is not None and view.load == 1
    table.update(replace(view.info, num_running=5))
    view = table.get("a")
    assert view is not None and view.load == 5


def test_a_replica_comes_back_only_by_an_update() -> None:
    table = table_of([replica("a")], {"a"})
    router = default_router(table)
    with pytest.raises(NoReplica, match="a is not connected"):
        router.route(RoutingQuery())
    table.note_sent("a")
    assert not table.views()[0].is_ready
    table.update(replica("a"))
    assert router.route(RoutingQuery()) == "a"
    table.remove("a")
    with pytest.raises(Unavailable, match="no replica has started"):
        router.route(RoutingQuery())


def test_a_replica_under_repair_is_a_last_resort() -> None:
    table = table_of([replica("a", ReplicaState.REPAIRING), replica("b", running=99)])
    assert routes(table, RoutingQuery(), 4) == ["b"] * 4
    table.disconnect("b")
    assert routes(table, RoutingQuery(), 2) == ["a"] * 2


def test_the_error_says_what_keeps_each_one_out() -> None:
    table = table_of([replica("a", ReplicaState.DRAINING), replica("b", ReplicaState.FAILED), replica("c")])
    with pytest.raises(NoReplica, match="a is draining, b is failed, c failed this request"):
        default_router(table).route(RoutingQuery(tried=frozenset("c")))
