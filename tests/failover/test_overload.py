"""Readers that are slow, requests that nobody reads, and frames that are none: each costs little, and only its own
connection."""

import asyncio
import socket
import time

import grpc
import pytest

from cluster.replica.client import WINDOW
from cluster.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from cluster.rpc.generated.remuda.v1 import replica_pb2, replica_pb2_grpc
from tests.failover.fleet_bed import collect, fleet_of
from tests.failover.wire import wire_to
from tests.support.leader_bed import request, serving, tokens_of, until
from tests.support.scripted_engine import answer


async def test_a_slow_reader_has_no_more_than_its_window_here() -> None:
    """The engine is not held up; what the reader has yet to take waits at the leader."""
    async with serving() as bed:
        wanted = request("slow", 20_000)
        stream = bed.client.generate(wanted)
        outputs = [await anext(stream)]
        await until(lambda: bed.engine.num_live == 0)
        await asyncio.sleep(0.2)  # whatever is on its way arrives
        (buffer,) = bed.client._streams.values()
        assert sum(len(output.token_ids) for output in buffer._outputs) + len(outputs[0].token_ids) == WINDOW
        quick = request("quick", 50)
        assert tokens_of([output async for output in bed.client.generate(quick)]) == answer(quick)
        outputs += [output async for output in stream]
        assert tokens_of(outputs) == answer(wanted)
        assert max(len(output.token_ids) for output in outputs) <= WINDOW


async def test_a_lost_connection_cancels_nothing_within_the_grace_and_all_after_it() -> None:
    async with serving(grace_s=0.6) as bed, wire_to(bed.address) as wire, open_channel(wire.address) as channel:
        call = replica_pb2_grpc.ReplicaStub(channel).Attach()
        await call.write(replica_pb2.FrontEndFrame(hello=replica_pb2.AttachHello(front_end_id="mute")))
        bed.engine.gate.clear()
        submit = replica_pb2.Submit(stream=1, request_id="left.0", token_ids=[1, 2], num_prompt_tokens=2)
        submit.sampling.max_tokens = 10**6
        await call.write(replica_pb2.FrontEndFrame(submit=submit))
        await until(lambda: bed.server.num_live_requests == 1)
        wire.cut()
        cut_s = time.monotonic()
        bed.engine.gate.set()
        await until(lambda: bed.engine.aborted == ["left.0"])
        assert time.monotonic() - cut_s >= 0.5
        assert bed.server.num_live_requests == 0


@pytest.mark.parametrize("kind", ["noise", "oversized"])
async def test_frames_that_are_none_close_their_own_connection_only(kind: str) -> None:
    async with fleet_of(1) as (fleet, (bed,)):
        bed.engine.gate.clear()
        wanted = request("other", 300)
        reader = asyncio.create_task(collect(fleet, wanted))
        await until(lambda: bed.server.num_live_requests == 1)
        if kind == "noise":
            await asyncio.to_thread(_send_noise, bed.address)
        else:
            await _send_too_much(bed.address)
        bed.engine.gate.set()
        assert tokens_of(await reader) == answer(wanted)
        assert bed.engine.aborted == []


async def _send_too_much(address: str) -> None:
    unlimited = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=unlimited) as channel:
        call = replica_pb2_grpc.ReplicaStub(channel).Attach()
        await call.write(replica_pb2.FrontEndFrame(hello=replica_pb2.AttachHello(front_end_id="x" * MAX_MESSAGE_BYTES)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
            await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def _send_noise(address: str) -> None:
    """What is no HTTP/2 at all; the leader hangs up."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        stranger.sendall(bytes(range(256)) * 64)
        while stranger.recv(4096):
            pass
