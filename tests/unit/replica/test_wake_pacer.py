"""Readers are woken at once on an idle loop; on a busy one they get more at a time, and still soon."""

import asyncio
import time

from cluster.errors import Unavailable
from cluster.replica.stream_buffer import StreamBuffer
from cluster.replica.wake_pacer import MAX_DELAY_S, WakePacer
from engine.request import FinishReason, Output


async def read_all(buffer: StreamBuffer, work_s: float) -> list[Output]:
    """A reader that keeps the loop busy for ``work_s`` with each output."""
    outputs = []
    while True:
        output = await buffer.get()
        time.sleep(work_s)  # noqa: ASYNC251  a stand-in for work, not a wait
        outputs.append(output)
        if output.finish_reason is not None:
            return outputs


async def feed(num_tokens: int, pause_s: float, work_s: float) -> list[Output]:
    """Puts a token every ``pause_s``; what the reader got."""
    pacer, buffer = WakePacer(), StreamBuffer("r")
    reader = asyncio.create_task(read_all(buffer, work_s))
    await asyncio.sleep(0)
    for token in range(num_tokens):
        reason = FinishReason.LENGTH if token == num_tokens - 1 else None
        buffer.put(Output("r", [token], reason))
        pacer.add(buffer)
        pacer.wake()
        await asyncio.sleep(pause_s)
    outputs = await asyncio.wait_for(reader, 10)
    assert [token for output in outputs for token in output.token_ids] == list(range(num_tokens))
    return outputs


async def test_an_idle_loop_adds_no_delay() -> None:
    pacer, buffer = WakePacer(), StreamBuffer("r")
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    buffer.put(Output("r", [1]))
    pacer.add(buffer)
    pacer.wake()
    await asyncio.sleep(0)
    assert reader.done()


async def test_a_loop_that_keeps_up_gets_token_by_token() -> None:
    assert len(await feed(num_tokens=10, pause_s=0.02, work_s=0.0)) >= 8


async def test_a_busy_loop_gets_more_at_a_time() -> None:
    """Tokens a millisecond apart (on a loaded machine some more), 20 ms of work for each output."""
    assert len(await feed(num_tokens=60, pause_s=0.001, work_s=0.02)) < 30


async def test_the_delay_is_bounded() -> None:
    pacer, buffer = WakePacer(), StreamBuffer("r")
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    buffer.put(Output("r", [1]))
    pacer.add(buffer)
    pacer.wake()
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251  the work of the first wake
    assert (await reader).token_ids == [1]
    reader = asyncio.create_task(buffer.get())
    for _ in range(10):
        await asyncio.sleep(0)
    buffer.put(Output("r", [2]))
    pacer.add(buffer)
    pacer.wake()
    assert (await asyncio.wait_for(reader, MAX_DELAY_S + 1)).token_ids == [2]


async def test_closing_wakes_whoever_waits() -> None:
    pacer, buffer = WakePacer(), StreamBuffer("r")
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    buffer.fail(Unavailable("gone"))
    pacer.add(buffer)
    pacer.close()
    await asyncio.sleep(0)
    assert isinstance(reader.exception(), Unavailable)
