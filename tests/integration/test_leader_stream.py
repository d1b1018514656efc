"""A real grpc.aio server and client on 127.0.0.1, an engine thread between them, no model."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.errors import Draining, TakenOver
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import SERVICE_NAME, LeaderServer
from cluster.rpc import convert
from cluster.rpc.channel import open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from cluster.simulate.gang import SimulatedGang, sequential_tokens
from cluster.types import ReplicaState
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Overloaded,
    RankFailure,
    RemudaError,
)
from engine.request import FinishReason, Request
from tests.support.leader_bed import INFO, WAIT_S, Bed, collect, health_of, request, serving, tokens_of, until
from tests.support.scripted_engine import answer


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    async with serving() as bed:
        yield bed


async def test_64_streams_share_one_stream_without_mixing(bed: Bed) -> None:
    wanted = [request(f"r{index}", max_tokens=1 + index % 40, prompt=[index] * 5, seed=index) for index in range(64)]
    found = await asyncio.gather(*(collect(bed.client, each) for each in wanted))
    for each, outputs in zip(wanted, found, strict=True):
        assert tokens_of(outputs) == answer(each)
        assert {output.request_id for output in outputs} == {each.request_id}
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [FinishReason.LENGTH]
    assert bed.client.num_live == bed.server.num_live_requests == bed.engine.num_live == 0


async def test_several_front_ends_do_not_see_one_another(bed: Bed) -> None:
    other = ReplicaClient(bed.address, "front-end-1")
    await other.connect(WAIT_S)
    wanted = [request(f"r{index}", 20, seed=index) for index in range(20)]
    found = await asyncio.gather(*(collect((bed.client, other)[i % 2], each) for i, each in enumerate(wanted)))
    assert [tokens_of(outputs) for outputs in found] == [answer(each) for each in wanted]
    await other.close()


async def test_the_real_engine_and_a_simulated_gang() -> None:
    groups = [KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=8)]
    gang = SimulatedGang(num_slots=8, kv_groups=groups, block_size=4, num_blocks=64, vocab_size=97, depth=2)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, max_num_waiting=64, depth=2)
    engine = Engine(
        executor=gang,
        kv_groups=groups,
        vocab_size=97,
        scheduler_config=config,
        cache_config=CacheConfig(block_size=4, num_blocks=64),
    )
    loop = EngineLoop(engine)
    server = LeaderServer(loop, INFO)
    client = ReplicaClient(await server.start(), "front-end-0")
    await client.connect(WAIT_S)
    wanted = [request(f"r{i}", 1 + i % 20, [(i * 7 + p) % 97 for p in range(1 + i % 30)], seed=i) for i in range(40)]
    found = await asyncio.gather(*(collect(client, each) for each in wanted))
    for each, outputs in zip(wanted, found, strict=True):
        assert tokens_of(outputs) == sequential_tokens(each.sampling, each.token_ids, each.num_prompt_tokens, 97)
    with pytest.raises(ContextLengthExceeded, match="64 tokens") as caught:
        await collect(client, request("long", 60, [1] * 30))
    assert caught.value.param == "max_tokens"
    async with aclosing(client.generate(request("given up", 60))) as stream:
        await anext(stream)
    await until(lambda: not engine.has_work and engine.stats().num_blocks_used == 0)
    info = await client.info()
    assert info.num_running == info.num_waiting == 0 and info.num_steps > 0
    await client.close()
    await server.stop(WAIT_S)
    engine.check_integrity()


async def test_closing_the_iterator_aborts_the_request(bed: Bed) -> None:
    stream = bed.client.generate(request("a", max_tokens=10**6))
    await anext(stream)
    await stream.aclose()
    await until(lambda: bed.engine.aborted == ["a"])
    steps = bed.engine.num_steps
    assert bed.client.num_live == 0
    assert tokens_of(await collect(bed.client, request("b"))) == answer(request("b"))
    assert bed.engine.num_steps <= steps + 8, "nothing of the aborted request was computed on"
    assert bed.server.num_live_requests == 0


async def test_cancelling_the_reading_task_aborts_the_request(bed: Bed) -> None:
    bed.engine.gate.clear()
    reader = asyncio.create_task(collect(bed.client, request("a", max_tokens=10**6)))
    await until(bed.engine.entered.is_set)
    reader.cancel()
    with suppress(asyncio.CancelledError):
        await reader
    bed.engine.gate.set()
    await until(lambda: bed.engine.aborted == ["a"])


async def test_a_stream_that_ended_is_not_aborted(bed: Bed) -> None:
    async with aclosing(bed.client.generate(request("a", max_tokens=1))) as stream:
        await anext(stream)
    await collect(bed.client, request("b"))
    assert bed.engine.aborted == []


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("top_k must be at least 0, not -1", "top_k"),
        ContextLengthExceeded("prompt (70 tokens) is too long", "prompt"),
        Overloaded("1024 requests are waiting", retry_after_s=4.0),
        RankFailure("rank 3 does not answer"),
    ],
)
async def test_refusals_keep_class_param_and_retry_time(bed: Bed, error: RemudaError) -> None:
    bed.engine.refuses["bad"] = error
    good = asyncio.create_task(collect(bed.client, request("good", 50)))
    with pytest.raises(type(error)) as caught:
        await collect(bed.client, request("bad"))
    assert type(caught.value) is type(error) and str(caught.value) == str(error)
    for name in ("param", "retry_after_s"):
        assert getattr(caught.value, name, None) == getattr(error, name, None)
    assert tokens_of(await good) == answer(request("good", 50))


async def test_an_id_that_is_live_has_its_reader(bed: Bed) -> None:
    bed.engine.gate.clear()
    first = asyncio.create_task(collect(bed.client, request("same", 3)))
    await until(bed.engine.entered.is_set)
    with pytest.raises(TakenOver, match="another reader"):
        await collect(bed.client, request("same", 3))
    bed.engine.gate.set()
    assert tokens_of(await first) == answer(request("same", 3))


async def test_a_big_prompt_arrives_whole(bed: Bed) -> None:
    prompt = random.Random(1).choices(range(202_048), k=100_000)
    received: list[Request] = []
    add = bed.engine.add
    bed.engine.add = lambda each: (received.append(each), add(each))[1]  # type: ignore[method-assign]
    big = request("big", 3, prompt)
    assert tokens_of(await collect(bed.client, big)) == answer(big)
    assert received == [big]


async def test_a_slow_reader_gets_everything_in_fewer_outputs(bed: Bed) -> None:
    wanted = request("slow", max_tokens=1500)
    stream = bed.client.generate(wanted)
    outputs = [await anext(stream)]
    await until(lambda: bed.engine.num_live == 0 and bed.client.num_live == 0)
    outputs += [output async for output in stream]
    assert len(outputs) == 2
    assert tokens_of(outputs) == answer(wanted)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_draining_refuses_the_new_and_finishes_the_old(bed: Bed) -> None:
    bed.engine.gate.clear()
    running = asyncio.create_task(collect(bed.client, request("old", 30)))
    await until(bed.engine.entered.is_set)
    assert (await bed.client.drain()).state is ReplicaState.DRAINING
    assert bed.client.state is ReplicaState.DRAINING
    with pytest.raises(Draining):
        await collect(bed.client, request("new"))
    assert await health_of(bed) == health_pb2.HealthCheckResponse.NOT_SERVING
    bed.engine.gate.set()
    assert tokens_of(await running) == answer(request("old", 30))


async def test_info_health_and_reflection(bed: Bed) -> None:
    info = await bed.client.info()
    assert (info.id, info.state, info.address, info.incarnation) == ("replica-0", ReplicaState.READY, bed.address, 7)
    assert bed.client.incarnation == 7 and bed.client.state is ReplicaState.READY
    assert await health_of(bed) == health_pb2.HealthCheckResponse.SERVING

    def reflected() -> set[str]:
        with grpc.insecure_channel(bed.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName(SERVICE_NAME)
            names = {"Attach", "DumpRecord", "FindRequest", "GetInfo", "Drain", "LoadAdapter", "UnloadAdapter"}
            assert {method.name for method in service.methods} == names
            return set(database.get_services())

    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= await asyncio.to_thread(reflected)


async def test_frames_are_numbered_without_gaps(bed: Bed) -> None:
    """Read by hand what a front end reads, and account for every token of every stream."""
    wanted = {number: request(f"r{number}", 50 + number, seed=number) for number in range(10)}
    async with open_channel(bed.address) as channel:
        call = replica_pb2_grpc.ReplicaStub(channel).Attach()
        await call.write(replica_pb2.FrontEndFrame(hello=replica_pb2.AttachHello(front_end_id="by hand")))
        first = await call.read()
        assert (first.sequence, first.incarnation, list(first.streams)) == (0, 7, [])
        for number, each in wanted.items():
            await call.write(replica_pb2.FrontEndFrame(submit=convert.request_to_proto(number, each)))
        sequence, found, ended = 0, {number: [] for number in wanted}, []
        while len(ended) < len(wanted):
            frame = await call.read()
            sequence += 1
            assert frame.sequence == sequence and frame.incarnation == 7
            assert len(set(frame.streams)) == len(frame.streams)
            start = 0
            for number, count in zip(frame.streams, frame.num_tokens, strict=True):
                found[number] += frame.token_ids[start : start + count]
                start += count
            ended += [finish.stream for finish in frame.finishes]
        assert sorted(ended) == sorted(wanted)
        assert found == {number: answer(each) for number, each in wanted.items()}
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
