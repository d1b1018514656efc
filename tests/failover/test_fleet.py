"""Streams outlive what produces them: leaders are cut off, broken and drained under a fleet, and nothing is lost."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
import pytest

from cluster.errors import Unavailable, UnknownStream
from cluster.frontend import fleet as fleet_module
from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from cluster.replica.keep import Keep
from cluster.types import ReplicaInfo
from engine.errors import EngineFailure, InvalidRequest, Overloaded, RankFailure
from engine.request import Pooling, Request, SamplingParams
from tests.failover.fleet_bed import POLICY, busy, collect, fleet_of
from tests.failover.wire import wire_to
from tests.support.leader_bed import Bed, request, serving, tokens_of, until
from tests.support.scripted_engine import answer, embedding_at


async def cut(bed: Bed) -> None:
    """The server goes without a word, its engine goes on."""
    assert bed.server._server is not None
    await bed.server._server.stop(None)


async def test_a_stream_goes_on_at_another_replica() -> None:
    async with fleet_of(2) as (fleet, beds):
        wanted = [request(f"r{index}", 4000, [index + 1] * 4, seed=index) for index in range(8)]
        readers = [asyncio.create_task(collect(fleet, each)) for each in wanted]
        await until(lambda: all(bed.engine.num_steps > 20 for bed in beds))
        beds[0].engine.fails_with = RankFailure("rank 1 died", rank=1)
        await until(lambda: beds[0].loop.failure is not None)
        assert not any(reader.done() for reader in readers)
        for each, reader in zip(wanted, readers, strict=True):
            outputs = await reader
            assert tokens_of(outputs) == answer(each)
            assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]


async def test_a_cut_connection_costs_no_computation_twice() -> None:
    wanted = request("a", 400)
    async with serving() as bed, wire_to(bed.address) as wire:
        client, fleet = ReplicaClient(wire.address, "front-end"), Fleet(policy=POLICY)
        await fleet.add("r0", client)
        bed.engine.gate.clear()
        stream = fleet.generate(wanted)
        reading = asyncio.create_task(anext(stream))
        await until(lambda: bed.server.num_live_requests == 1)
        for _ in range(2):
            wire.cut()
            await until(lambda: not client.is_connected)
            await until(lambda: client.is_connected)
        bed.engine.gate.set()
        outputs = [await reading] + [output async for output in stream]
        assert tokens_of(outputs) == answer(wanted)
        assert bed.engine.aborted == []
        assert bed.engine.num_steps <= 400 + 2
        await fleet.close()


def embedding_request(name: str) -> Request:
    return msgspec.structs.replace(request(name), sampling=SamplingParams(0, pooling=Pooling.MEAN))


async def test_an_embedding_is_computed_again_as_a_whole_elsewhere() -> None:
    async with fleet_of(2) as (fleet, beds):
        for bed in beds:
            bed.engine.gate.clear()
        wanted = embedding_request("a")
        reader = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: any(bed.engine.num_live for bed in beds))
        first = busy(beds)
        (other,) = [bed for bed in beds if bed is not first]
        first.engine.fails_with = RankFailure("rank 1 died", rank=1)
        first.engine.gate.set()
        await until(lambda: other.engine.num_live == 1)
        assert not reader.done()
        other.engine.gate.set()
        assert [output.pooled for output in await reader] == [embedding_at(wanted)]


async def test_an_embedding_waits_at_its_leader_for_the_connection() -> None:
    wanted = embedding_request("a")
    async with serving() as bed, wire_to(bed.address) as wire:
        client, fleet = ReplicaClient(wire.address, "front-end"), Fleet(policy=POLICY)
        await fleet.add("r0", client)
        bed.engine.gate.clear()
        reader = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: bed.engine.num_live == 1)
        wire.cut()
        await until(lambda: not client.is_connected)
        bed.engine.gate.set()
        assert [output.pooled for output in await reader] == [embedding_at(wanted)]
        assert bed.engine.num_steps == 1
        await fleet.close()


async def test_positions_count_from_the_first_token_also_where_it_was_generated_elsewhere() -> None:
    """More came with it than a window holds, so the reader's credit must count from there too."""
    wanted = request("a.0", 8000)
    given, whole = 3000, answer(wanted)
    moved = msgspec.structs.replace(wanted, request_id="a.0~1", token_ids=[*wanted.token_ids, *whole[:given]])
    async with serving() as bed:
        found: list[int] = []
        async with aclosing(bed.client.generate(moved, Keep(b"call"))) as first:
            async for output in first:
                found += output.token_ids
                if len(found) > 3000:
                    break
        assert found == whole[given : given + len(found)]
        for position in (0, given - 1, given, given + len(found)):
            rest = [output async for output in bed.client.resume("a.0~1", position, 0, Keep())]
            assert tokens_of(rest) == whole[position:]


async def test_what_moved_away_ends_where_it_was() -> None:
    """Both replicas live, but one cannot be reached for longer than there is patience for."""
    async with fleet_of(2) as (fleet, beds):
        for bed in beds:
            bed.engine.gate.clear()
        reader = asyncio.create_task(collect(fleet, request("a", 30)))
        await until(lambda: sum(bed.server.num_live_requests for bed in beds) == 1)
        (lost,) = [bed for bed in beds if bed.server.num_live_requests]
        other = beds[1 - beds.index(lost)]
        await cut(lost)
        other.engine.gate.set()
        assert tokens_of(await reader) == answer(request("a", 30))
        assert other.engine.num_steps > 0


async def test_a_replica_that_is_alone_is_waited_for() -> None:
    async with fleet_of(1) as (fleet, (bed,)):
        wanted = request("a", 5000)
        stream = fleet.generate(wanted)
        outputs = [await anext(stream)]
        await until(lambda: bed.engine.num_steps > 20)
        bed.engine.gate.clear()
        await cut(bed)
        async with serving(bind=bed.address) as again:
            outputs += [output async for output in stream]
            assert tokens_of(outputs) == answer(wanted)
            assert 0 < again.engine.num_steps < 5000, "what was delivered is not computed again"


async def test_a_leader_that_was_replaced_elsewhere() -> None:
    async with fleet_of(1) as (fleet, (bed,)), serving() as successor:
        wanted = request("a", 5000)
        reader = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: bed.engine.num_steps > 20)
        await cut(bed)
        await fleet.add("r0", ReplicaClient(successor.address, "front-end"))
        assert tokens_of(await reader) == answer(wanted)
        assert [info.id for info in fleet.replicas()] == ["r0"]


async def test_patience_ends_in_one_error() -> None:
    async with fleet_of(1) as (fleet, (bed,)):
        bed.engine.gate.clear()
        reader = asyncio.create_task(collect(fleet, request("a", 30)))
        await until(lambda: bed.server.num_live_requests == 1)
        bed.engine.fails_with = RankFailure("rank 1 died", rank=1)
        bed.engine.gate.set()
        with pytest.raises(Unavailable, match=r"within 5 s.*rank 1 died"):
            await reader


async def test_what_breaks_every_replica_is_given_up() -> None:
    async with fleet_of(3) as (fleet, beds):
        for bed in beds:
            bed.engine.fails_with = EngineFailure("it broke")
        with pytest.raises(Unavailable, match="it broke"):
            await collect(fleet, request("poison", 30))


@pytest.mark.parametrize("error", [InvalidRequest("no", "top_k"), Overloaded("full", 3.0)])
async def test_a_refusal_comes_at_once(error: InvalidRequest | Overloaded) -> None:
    async with fleet_of(2) as (fleet, beds):
        for bed in beds:
            bed.engine.refuses["a"] = error
        with pytest.raises(type(error), match=str(error)):
            await collect(fleet, request("a"))


async def test_a_full_replica_is_passed_over() -> None:
    async with fleet_of(2) as (fleet, beds):
        beds[0].engine.refuses = {f"r{index}": Overloaded("full") for index in range(4)}
        for index in range(4):
            assert tokens_of(await collect(fleet, request(f"r{index}"))) == answer(request(f"r{index}"))


async def test_nobody_ready_is_said_at_once() -> None:
    async with fleet_of(1) as (fleet, (bed,)):
        await fleet.drain("r0")
        with pytest.raises(Unavailable):
            await collect(fleet, request("a"))
        assert bed.engine.num_steps == 0


async def streams_move_off(beds: Sequence[Bed], reader: Fleet, drained_by: Fleet, migrate_after_s: float) -> None:
    """What ``reader`` reads at the first replica, which cannot end there, once ``drained_by`` has drained it."""
    wanted = [request(f"r{index}", 3000, [index + 1] * 4) for index in range(4)]
    readers = [asyncio.create_task(collect(reader, each)) for each in wanted]
    await until(lambda: all(bed.engine.num_steps > 20 for bed in beds))
    beds[0].engine.gate.clear()
    await drained_by.drain("r0", migrate_after_s=migrate_after_s)
    for each, read in zip(wanted, readers, strict=True):
        assert tokens_of(await read) == answer(each)
    assert beds[0].server.num_live_requests == 0


async def test_streams_move_off_a_draining_replica() -> None:
    async with fleet_of(2) as (fleet, beds):
        await streams_move_off(beds, fleet, fleet, migrate_after_s=0.0)
        beds[0].engine.gate.set()
        await until(lambda: bool(beds[0].engine.aborted))


async def test_streams_of_other_front_ends_move_off_a_draining_replica_too() -> None:
    async with fleet_of(2) as (fleet, beds):
        other = Fleet(policy=POLICY, migrate_after_s=0.1)
        for index, bed in enumerate(beds):
            await other.add(f"r{index}", ReplicaClient(bed.address, "another front end"))
        await streams_move_off(beds, other, fleet, migrate_after_s=3600.0)
        await other.close()


async def test_leaving_a_stream_ends_its_work() -> None:
    async with fleet_of(2) as (fleet, beds):
        stream = fleet.generate(request("a", 10**6))
        await anext(stream)
        found = busy(beds)
        await stream.aclose()
        await until(lambda: found.engine.aborted == ["a"])


async def test_a_request_is_unknown_only_where_everybody_could_be_asked() -> None:
    """A client that comes back to a front end which has just started must try again, not begin anew."""
    with pytest.raises(Unavailable, match="try again"):
        await Fleet(policy=POLICY).find("c")
    async with fleet_of(2) as (fleet, beds):
        with pytest.raises(UnknownStream):
            await fleet.find("c")
        await cut(beds[0])
        with pytest.raises(Unavailable, match="try again"):
            await fleet.find("c")


async def test_a_request_may_be_with_a_replica_that_could_not_join_yet() -> None:
    """A front end that has just started, and one of the two leaders does not answer it."""
    async with fleet_of(1) as (fleet, _):
        late = ReplicaClient("127.0.0.1:9", "front-end")
        with pytest.raises(Unavailable):
            await fleet.add("late", late)
        await late.close()
        with pytest.raises(Unavailable, match="try again"):
            await fleet.find("c")
        await fleet.remove("late")
        with pytest.raises(UnknownStream):
            await fleet.find("c")


async def test_idle_replicas_are_left_in_peace_until_somebody_asks_for_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_module, "REFRESH_INTERVAL_S", 0.01)
    monkeypatch.setattr(fleet_module, "IDLE_REFRESH_INTERVAL_S", 3600.0)
    num_questions = 0
    asked = ReplicaClient.info

    async def noted(self: ReplicaClient, timeout_s: float = 5.0) -> ReplicaInfo:
        nonlocal num_questions
        num_questions += 1
        return await asked(self, timeout_s)

    async with fleet_of(1) as (fleet, (bed,)):
        monkeypatch.setattr(ReplicaClient, "info", noted)
        await asyncio.sleep(0.2)
        assert num_questions <= 1
        bed.engine.gate.clear()
        wanted = request("a", 10)
        reading = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: num_questions >= 5)  # while it runs, at the usual pace
        bed.engine.gate.set()
        assert tokens_of(await reading) == answer(wanted)
