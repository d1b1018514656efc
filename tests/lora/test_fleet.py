"""Several replicas: an adapter is on all of them or on none. Leaders, their gRPC servers and clients are real."""

from contextlib import AsyncExitStack

import pytest

from cluster.errors import Unavailable
from cluster.frontend.adapters import Adapters
from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from engine.errors import AdapterError
from engine.request import AdapterInfo
from tests.support.leader_bed import Bed, serving, until


async def _fleet(stack: AsyncExitStack) -> tuple[Fleet, list[Bed]]:
    beds = [await stack.enter_async_context(serving()) for _ in range(2)]
    fleet = Fleet()
    for index, bed in enumerate(beds):
        await fleet.add(f"replica-{index}", ReplicaClient(bed.address, "front-end"))
    stack.push_async_callback(fleet.close)
    return fleet, beds


async def test_on_all_replicas() -> None:
    async with AsyncExitStack() as stack:
        fleet, beds = await _fleet(stack)
        await fleet.load_adapter("poet", "somewhere")
        assert [bed.engine.adapters for bed in beds] == [(AdapterInfo("poet", "somewhere", 1000),)] * 2
        assert Adapters("m", fleet).loaded() == [AdapterInfo("poet", "somewhere", 2000)]
        await fleet.unload_adapter("poet")
        assert [bed.engine.adapters for bed in beds] == [()] * 2
        assert not Adapters("m", fleet).loaded()


async def test_or_on_none() -> None:
    async with AsyncExitStack() as stack:
        fleet, beds = await _fleet(stack)
        beds[1].engine.broken_paths.add("only here")
        with pytest.raises(AdapterError, match="only here is broken"):
            await fleet.load_adapter("poet", "only here")
        assert [bed.engine.adapters for bed in beds] == [()] * 2
        # One that only one replica has cannot be named.
        await beds[0].client.load_adapter("half", "somewhere")
        await until(lambda: any(info.adapters for info in fleet.replicas()))
        assert not Adapters("m", fleet).loaded()


async def test_a_replica_that_stops_ends_what_waits() -> None:
    async with serving() as bed:
        await bed.server.drain()
        with pytest.raises(Unavailable):
            await bed.client.load_adapter("poet", "somewhere")
