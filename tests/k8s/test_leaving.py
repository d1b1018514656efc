"""A fleet whose members are announced, change their address, and stand on nodes that will be emptied."""

import asyncio

from cluster.frontend.fleet import Fleet
from cluster.frontend.leader_set import LeaderSet
from cluster.replica.client import ReplicaClient
from cluster.types import ReplicaState
from tests.failover.fleet_bed import POLICY, collect, fleet_of
from tests.support.leader_bed import request, serving, tokens_of, until
from tests.support.scripted_engine import answer


def states(fleet: Fleet) -> dict[str, ReplicaState]:
    return {info.id: info.state for info in fleet.replicas()}


async def test_nothing_new_goes_to_a_replica_that_is_set_aside() -> None:
    async with fleet_of(2) as (fleet, beds):
        fleet.set_aside(["r0"])
        await until(lambda: states(fleet)["r0"] is ReplicaState.DRAINING)
        before = beds[0].engine.num_steps
        for index in range(6):
            wanted = request(f"q{index}", 5, [index + 1] * 4)
            assert tokens_of(await collect(fleet, wanted)) == answer(wanted)
        assert beds[0].engine.num_steps == before
        assert beds[1].engine.num_steps > 0

        fleet.set_aside([])
        await until(lambda: states(fleet)["r0"] is ReplicaState.READY)


async def test_what_runs_there_moves_after_a_while() -> None:
    fleet = Fleet(policy=POLICY, migrate_after_s=0.2)
    async with serving() as first, serving() as second:
        beds = first, second
        for index, bed in enumerate(beds):
            bed.engine.gate.clear()
            await fleet.add(f"r{index}", ReplicaClient(bed.address, "front-end"))
        wanted = request("a", 300)
        reader = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: sum(bed.server.num_live_requests for bed in beds) == 1)
        leaving = 0 if first.server.num_live_requests else 1
        beds[1 - leaving].engine.gate.set()
        fleet.set_aside([f"r{leaving}"])
        # Its engine stands still: only at the other one can it end.
        assert tokens_of(await reader) == answer(wanted)
        await fleet.close()


async def test_the_last_replica_is_used_as_long_as_it_is_there() -> None:
    async with fleet_of(1) as (fleet, _):
        fleet.set_aside(["r0"])
        wanted = request("a", 20)
        assert tokens_of(await collect(fleet, wanted)) == answer(wanted)
        assert states(fleet) == {"r0": ReplicaState.READY}


async def test_leaders_join_are_replaced_and_leave_as_the_list_says() -> None:
    told: list[str] = []
    fleet = Fleet(policy=POLICY)
    known = LeaderSet(fleet, lambda address: ReplicaClient(address, "front-end"), told.append)
    async with serving() as first, serving() as second:
        known.update({"a": first.address})
        await until(lambda: states(fleet) == {"a": ReplicaState.READY})
        known.update({"a": second.address, "b": first.address})
        await until(lambda: len(states(fleet)) == 2 and f"a at {second.address} has joined" in told)
        known.update({"b": first.address})
        await until(lambda: states(fleet) == {"b": ReplicaState.READY})
        await known.close()
        await fleet.close()


async def test_a_leader_that_does_not_answer_yet_is_waited_for() -> None:
    told: list[str] = []
    fleet = Fleet(policy=POLICY)
    async with serving() as bed:
        address = bed.address
    known = LeaderSet(fleet, lambda address: ReplicaClient(address, "front-end"), told.append)
    known.update({"a": address})
    async with serving(bind=address):
        await until(lambda: states(fleet) == {"a": ReplicaState.READY})
    await known.close()
    await fleet.close()


async def test_a_leader_that_never_answered_can_be_taken_back() -> None:
    fleet = Fleet(policy=POLICY)
    known = LeaderSet(fleet, lambda address: ReplicaClient(address, "front-end"), lambda text: None)
    known.update({"a": "127.0.0.1:9"})
    await asyncio.sleep(0)
    known.update({})
    async with asyncio.timeout(5):
        await known.close()
    assert states(fleet) == {}
    await fleet.close()
