"""What breaks between a front end and a leader, and how each side takes it."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from cluster.errors import ConnectionLost, StartFailed, Unauthenticated, Unavailable
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from cluster.rpc import convert
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.types import ReplicaState
from engine.errors import (
    ContextLengthExceeded,
    Overloaded,
    RankFailure,
)
from tests.support.leader_bed import INFO, WAIT_S, Bed, collect, health_of, request, serving, tokens_of, until
from tests.support.scripted_engine import ScriptedEngine, answer


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    async with serving() as bed:
        yield bed


async def test_a_failed_engine_ends_every_stream_once_and_is_seen(bed: Bed) -> None:
    bed.engine.gate.clear()
    readers = [asyncio.create_task(collect(bed.client, request(f"r{index}", 100))) for index in range(10)]
    await until(lambda: bed.server.num_live_requests == 10)
    bed.engine.fails_with = RankFailure("rank 1 died", rank=1)
    bed.engine.gate.set()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert {(type(result), str(result)) for result in results} == {(RankFailure, "rank 1 died")}
    info = await bed.client.info()
    assert (info.state, info.error) == (ReplicaState.FAILED, "rank 1 died")
    assert await health_of(bed) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Unavailable, match="rank 1 died"):
        await collect(bed.client, request("late"))


async def test_too_big_a_prompt_breaks_nothing_but_itself(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.replica.client.MAX_REQUEST_TOKENS", 100)
    with pytest.raises(ContextLengthExceeded, match="101 tokens"):
        await collect(bed.client, request("big", 3, [1] * 101))
    assert tokens_of(await collect(bed.client, request("ok"))) == answer(request("ok"))


async def test_too_many_streams_are_refused_here() -> None:
    async with serving() as bed:
        bed.engine.gate.clear()
        small = ReplicaClient(bed.address, "small", max_streams=2)
        await small.connect(WAIT_S)
        readers = [asyncio.create_task(collect(small, request(f"r{index}"))) for index in range(2)]
        await until(lambda: small.num_live == 2)
        with pytest.raises(Overloaded, match="2 requests"):
            await collect(small, request("r2"))
        bed.engine.gate.set()
        await asyncio.gather(*readers)
        assert tokens_of(await collect(small, request("r2"))) == answer(request("r2"))
        await small.close()


async def test_a_lost_leader_ends_streams_once_and_is_attached_again() -> None:
    async with serving(grace_s=0.5) as bed:
        bed.engine.gate.clear()
        streams = [bed.client.generate(request(f"r{index}", 100)) for index in range(5)]
        readers = [asyncio.create_task(anext(stream)) for stream in streams]
        await until(lambda: bed.server.num_live_requests == 5)
        # The server goes without a word: no frame ends the streams.
        assert bed.server._server is not None
        await bed.server._server.stop(None)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert {type(result) for result in results} == {ConnectionLost}
        for stream in streams:
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert bed.client.state is ReplicaState.FAILED and not bed.client.is_connected and bed.client.num_live == 0
        with pytest.raises(Unavailable, match="broken"):
            await collect(bed.client, request("meanwhile"))
        await until(lambda: bed.server.num_live_requests == 0)
        bed.engine.gate.set()
        await until(lambda: len(bed.engine.aborted) == 5)
        async with serving(bind=bed.address) as again:
            await until(lambda: bed.client.is_connected)
            assert bed.client.state is ReplicaState.READY
            assert tokens_of(await collect(bed.client, request("after"))) == answer(request("after"))
            assert again.engine.num_steps > 0


async def test_a_front_end_that_leaves_has_its_requests_aborted(bed: Bed) -> None:
    other = ReplicaClient(bed.address, "front-end-1")
    await other.connect(WAIT_S)
    bed.engine.gate.clear()
    kept = asyncio.create_task(collect(bed.client, request("kept", 20)))
    lost = [asyncio.create_task(collect(other, request(f"lost{index}", 10**6))) for index in range(3)]
    await until(lambda: bed.server.num_live_requests == 4)
    await other.close()
    bed.engine.gate.set()
    results = await asyncio.gather(*lost, return_exceptions=True)
    assert {type(result) for result in results} == {ConnectionLost}
    await until(lambda: sorted(bed.engine.aborted) == ["lost0", "lost1", "lost2"])
    assert tokens_of(await kept) == answer(request("kept", 20))


async def test_stopping_the_leader_tells_its_streams(bed: Bed) -> None:
    bed.engine.gate.clear()
    reader = asyncio.create_task(collect(bed.client, request("a", 10**6)))
    await until(bed.engine.entered.is_set)
    stopping = asyncio.create_task(bed.server.stop(WAIT_S))
    bed.engine.gate.set()
    with pytest.raises(Unavailable, match="stopped"):
        await reader
    await stopping


def frames(*numbers: tuple[int, int]) -> list[replica_pb2.LeaderFrame]:
    return [replica_pb2.LeaderFrame(incarnation=life, sequence=number) for life, number in numbers]


@pytest.mark.parametrize(
    "sent",
    [frames((1, 0), (1, 2)), frames((1, 0), (1, 1), (1, 1)), frames((1, 0), (2, 1)), frames((1, 1))],
    ids=["gap", "duplicate", "other life", "no start"],
)
async def test_the_client_notices_lost_and_doubled_frames(sent: list[replica_pb2.LeaderFrame]) -> None:
    class Liar(replica_pb2_grpc.ReplicaServicer):
        async def Attach(self, request_iterator, context):  # type: ignore[no-untyped-def]
            await anext(request_iterator)
            await context.write(sent[0])
            if sent[0].sequence == 0:
                await anext(request_iterator)  # a request: there is a stream to break
            for frame in sent[1:]:
                await context.write(frame)
            await asyncio.Event().wait()

        async def GetInfo(self, request, context):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        async def Drain(self, request, context):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    server = grpc.aio.server()
    replica_pb2_grpc.add_ReplicaServicer_to_server(Liar(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = ReplicaClient(f"127.0.0.1:{port}", "front-end-0")
    if sent[0].sequence:
        with pytest.raises(Unavailable, match="frame 1 came where 0 was due"):
            await client.connect(0.5)
    else:
        await client.connect(WAIT_S)
        with pytest.raises(Unavailable, match=r"came where|writes on"):
            await collect(client, request("a"))
    await client.close()
    await server.stop(None)


@pytest.mark.parametrize("kind", ["no hello", "second hello", "stream twice"])
async def test_a_front_end_that_breaks_the_rules_is_cut_off(bed: Bed, kind: str) -> None:
    hello = replica_pb2.FrontEndFrame(hello=replica_pb2.AttachHello(front_end_id="odd"))
    submit = replica_pb2.FrontEndFrame(submit=convert.request_to_proto(4, request("r", 10**6)))
    sent = {"no hello": [submit], "second hello": [hello, submit, hello], "stream twice": [hello, submit, submit]}[kind]
    async with open_channel(bed.address) as channel:
        call = replica_pb2_grpc.ReplicaStub(channel).Attach()
        for frame in sent:
            await call.write(frame)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: bed.server.num_live_requests == bed.engine.num_live == 0)


async def test_a_port_that_is_taken_is_an_error_that_says_so(bed: Bed) -> None:
    loop = EngineLoop(ScriptedEngine())
    with pytest.raises(StartFailed, match="free port"):
        await LeaderServer(loop, INFO, bed.address).start()
    assert loop.state is ReplicaState.STARTING


async def test_no_leader_is_an_error_in_bounded_time() -> None:
    client = ReplicaClient("127.0.0.1:1", "front-end-0")
    with pytest.raises(Unavailable, match=r"no leader answers at 127\.0\.0\.1:1"):
        await client.connect(0.3)
    with pytest.raises(Unavailable):
        await collect(client, request("a"))
    await client.close()


async def test_a_refusal_that_crosses_the_first_message_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's library then says INTERNAL in place of the leader's status: rare, so the error is put here by hand."""
    server = LeaderServer(EngineLoop(ScriptedEngine()), INFO, secret="geheim")
    stranger = ReplicaClient(await server.start(), "stranger", secret="g")

    async def crossed(_: ReplicaClient) -> None:
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, "Internal error from Core")

    monkeypatch.setattr(ReplicaClient, "_attach", crossed)
    with pytest.raises(Unavailable, match="secret"):
        await stranger.connect(0.3)
    await stranger.close()
    await server.stop(WAIT_S)


async def test_only_those_who_know_the_secret_are_served() -> None:
    engine = ScriptedEngine()
    server = LeaderServer(EngineLoop(engine), INFO, secret="geheim")
    address = await server.start()
    for secret in ("", "geheim!", "g"):
        stranger = ReplicaClient(address, "stranger", secret=secret)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(Unavailable, match="--secret-file"):
                await stranger.connect(60)  # it is refused at once
        with pytest.raises(Unauthenticated):
            await stranger.info()
        with pytest.raises(Unauthenticated):
            await stranger.drain()
        await stranger.close()
    assert server.info().state is ReplicaState.READY
    friend = ReplicaClient(address, "friend", secret="geheim")
    await friend.connect(WAIT_S)
    assert tokens_of(await collect(friend, request("a"))) == answer(request("a"))
    assert (await friend.info()).id == "replica-0"
    await friend.close()
    await server.stop(WAIT_S)
