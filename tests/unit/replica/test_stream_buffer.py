"""What waits for one reader: in order, merged, and once ended never again."""

import asyncio
from contextlib import suppress

import pytest

from cluster.errors import Unavailable
from cluster.replica.outputs import merge
from cluster.replica.stream_buffer import StreamBuffer
from engine.request import FinishReason, Output, TopLogprobs


def scored(token_id: int) -> TopLogprobs:
    return TopLogprobs(-1.0, 1, [token_id], [-1.0])


async def test_outputs_that_wait_become_one() -> None:
    buffer = StreamBuffer("r")
    buffer.put(Output("r", [1], logprobs=[scored(1)]))
    buffer.put(Output("r", [2, 3], logprobs=[scored(2), scored(3)]))
    buffer.put(Output("r", [4], FinishReason.STOP, 4, [scored(4)], num_cached_tokens=9))
    wanted = Output("r", [1, 2, 3, 4], FinishReason.STOP, 4, [scored(n) for n in (1, 2, 3, 4)], num_cached_tokens=9)
    assert await buffer.get() == wanted


async def test_the_error_comes_after_what_was_there_before_it() -> None:
    buffer = StreamBuffer("r")
    buffer.put(Output("r", [1]))
    buffer.fail(Unavailable("gone"))
    assert (await buffer.get()).token_ids == [1]
    for _ in range(2):
        with pytest.raises(Unavailable, match="gone"):
            await buffer.get()


async def test_a_cancelled_reader_does_not_stop_the_writer() -> None:
    """Between a task's cancelling and its end, more may come for it."""
    buffer = StreamBuffer("r")
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    reader.cancel()
    for token_id in (1, 2):
        buffer.put(Output("r", [token_id]))
        buffer.wake()
    with suppress(asyncio.CancelledError):
        await reader
    assert (await buffer.get()).token_ids == [1, 2]


async def test_two_puts_before_the_reader_wakes() -> None:
    buffer = StreamBuffer("r")
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)
    for token_id in (1, 2):
        buffer.put(Output("r", [token_id]))
        buffer.wake()
    assert (await reader).token_ids == [1, 2]


def test_prompt_logprobs_of_chunks_are_joined() -> None:
    first = Output("r", [], prompt_logprobs=[None, scored(1)])
    assert merge([first, Output("r", [], prompt_logprobs=[scored(2)])]).prompt_logprobs == [None, scored(1), scored(2)]
    assert merge([first, Output("r", [5])]).prompt_logprobs == [None, scored(1)]
    assert merge([Output("r", [5]), first]).token_ids == [5]


async def test_a_very_slow_reader_costs_no_more_than_its_tokens() -> None:
    """Merging one by one would copy five billion entries here."""
    buffer = StreamBuffer("r")
    for token_id in range(100_000):
        buffer.put(Output("r", [token_id]))
    async with asyncio.timeout(10):
        assert (await buffer.get()).token_ids == list(range(100_000))


def test_nothing_may_follow_a_finish() -> None:
    with pytest.raises(AssertionError, match="after its finish"):
        merge([Output("r", [1], FinishReason.STOP), Output("r", [2])])
