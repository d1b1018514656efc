"""A leader that takes a lost one's place at the same address: front ends that know nothing else find it there."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.errors import Unavailable
from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from cluster.types import ReplicaState
from engine.request import Output
from tests.failover.fleet_bed import POLICY
from tests.support.leader_bed import INFO, WAIT_S, Bed, request, serving, tokens_of, until
from tests.support.scripted_engine import ScriptedEngine, answer

pytestmark = pytest.mark.timeout(60)


@asynccontextmanager
async def next_leader(lost: Bed) -> AsyncIterator[ScriptedEngine]:
    """In place of that one, which is gone."""
    engine = ScriptedEngine()
    server = LeaderServer(EngineLoop(engine), replace(INFO, incarnation=INFO.incarnation + 1), lost.address)
    await server.start()
    try:
        yield engine
    finally:
        await server.stop(WAIT_S)


async def rest_of(stream: AsyncGenerator[Output, None]) -> list[Output]:
    return [output async for output in stream]


async def test_streams_go_on_at_it_and_adapters_of_other_replicas_come_first() -> None:
    wanted = request("a", 20_000)
    fleet = Fleet(policy=POLICY)
    async with serving() as lost, serving() as other:
        await fleet.add("r0", ReplicaClient(lost.address, "front-end"))
        stream = fleet.generate(wanted)
        outputs = [await anext(stream)]
        await fleet.add("r1", ReplicaClient(other.address, "front-end"))
        await fleet.load_adapter("warm", "/adapters/warm")
        await fleet.drain("r1")
        await lost.server.stop()
        await until(lambda: fleet.replicas()[0].state is ReplicaState.FAILED)
        async with next_leader(lost) as engine:
            await until(lambda: fleet.replicas()[0].state is ReplicaState.READY)
            assert [adapter.name for adapter in fleet.replicas()[0].adapters] == ["warm"]
            assert [adapter.name for adapter in engine.adapters] == ["warm"]
            outputs += await rest_of(stream)
            assert tokens_of(outputs) == answer(wanted)
        await fleet.close()


async def test_what_was_unloaded_before_it_came_stays_away() -> None:
    """What the replica had when this front end looked last may be outdated: its supervisor knows."""
    fleet = Fleet(policy=POLICY)
    async with serving() as lost:
        await fleet.add("r0", ReplicaClient(lost.address, "front-end"))
        await fleet.load_adapter("warm", "/adapters/warm")
        await lost.server.stop()
        await until(lambda: fleet.replicas()[0].state is ReplicaState.FAILED)
        async with next_leader(lost) as engine:
            await until(lambda: fleet.replicas()[0].state is ReplicaState.READY)
            assert fleet.replicas()[0].adapters == engine.adapters == ()
        await fleet.close()


async def test_the_supervisor_hears_of_adapters() -> None:
    told: list[dict[str, str]] = []
    server = LeaderServer(EngineLoop(ScriptedEngine()), INFO, on_adapters=told.append)
    client = ReplicaClient(await server.start(), "front-end")
    await client.connect()
    await client.load_adapter("warm", "/adapters/warm")
    await client.load_adapter("cold", "/adapters/cold")
    await client.unload_adapter("warm")
    await client.close()
    await server.stop()
    both = {"warm": "/adapters/warm", "cold": "/adapters/cold"}
    assert told == [{"warm": "/adapters/warm"}, both, {"cold": "/adapters/cold"}]


async def test_what_ran_at_the_one_before_may_still_come() -> None:
    """Another front end may be about to begin it here, so that a client is not told that nobody has it."""
    server = LeaderServer(EngineLoop(ScriptedEngine()), INFO, is_successor=True)
    client = ReplicaClient(await server.start(), "front-end")
    await client.connect()
    with pytest.raises(Unavailable, match="may still come"):
        await client.find("call")
    await client.close()
    await server.stop()


async def test_whoever_replaces_leaders_is_waited_for_also_at_the_same_address() -> None:
    """Nothing goes there by itself: it may be about to say that this leader has failed too."""
    wanted = request("a", 20_000)
    fleet = Fleet(policy=POLICY)
    async with serving() as lost:
        await fleet.add("r0", ReplicaClient(lost.address, "front-end"))
        stream = fleet.generate(wanted)
        first = await anext(stream)
        await fleet.await_leader("r0")
        await lost.server.stop()
        async with next_leader(lost) as engine:
            reader = asyncio.create_task(rest_of(stream))
            ended, _ = await asyncio.wait([reader], timeout=0.5)
            assert not ended and engine.num_steps == 0
            await fleet.add("r0", ReplicaClient(lost.address, "front-end"))
            assert tokens_of([first, *await reader]) == answer(wanted)
        await fleet.close()


async def test_where_its_port_is_in_use_it_takes_another_one() -> None:
    async with serving() as stranger:
        server = LeaderServer(EngineLoop(ScriptedEngine()), INFO, stranger.address, needs_port=False)
        address = await server.start()
        assert address.rpartition(":")[0] == "127.0.0.1" and address != stranger.address
        client = ReplicaClient(address, "front-end")
        await client.connect()
        assert (await client.info()).address == address
        await client.close()
        await server.stop()


async def test_it_is_drained_like_the_one_before_though_it_takes_no_adapters_then() -> None:
    fleet = Fleet(policy=POLICY)
    async with serving() as lost, serving() as other:
        await fleet.add("r0", ReplicaClient(lost.address, "front-end"))
        await fleet.add("r1", ReplicaClient(other.address, "front-end"))
        await fleet.load_adapter("warm", "/adapters/warm")
        await lost.server.stop()
        async with serving(bind=lost.address) as drained:
            await drained.server.drain()
            await fleet.add("r0", ReplicaClient(drained.address, "front-end"))
            assert fleet.replicas()[0].state is ReplicaState.DRAINING
        await fleet.close()


async def test_it_waits_for_its_port_while_the_one_before_is_being_killed() -> None:
    """Ray takes seconds to kill a process that is stopped."""
    hung = socket.create_server(("127.0.0.1", 0))
    bind = f"127.0.0.1:{hung.getsockname()[1]}"
    server = LeaderServer(EngineLoop(ScriptedEngine()), INFO, bind, needs_port=False, is_successor=True)
    started = asyncio.create_task(server.start())
    ended, _ = await asyncio.wait([started], timeout=0.5)
    assert not ended
    hung.close()
    assert await started == bind
    await server.stop()
