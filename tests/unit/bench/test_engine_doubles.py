"""What the benchmarks put in the place of an engine or its ranks does what it stands for."""

import asyncio
import threading
import time

import pytest

from bench.host_step_leader import build_engine, null_gang
from bench.mock_engine import FIRST_TOKEN_ID, NUM_TOKEN_IDS, MockEngine, Pace
from engine.request import FinishReason, Output, Request, SamplingParams


def request(name: str, max_tokens: int) -> Request:
    return Request(name, [1, 2, 3], 3, SamplingParams(max_tokens=max_tokens))


def tokens_of(outputs: list[Output], name: str) -> list[int]:
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


def test_the_real_engine_takes_the_null_ranks_answers() -> None:
    with null_gang(0.002) as (executor, hub):
        engine = build_engine(5, executor)
        for index in range(5):
            engine.add(request(f"r{index}", 3 + index))
        outputs = []
        began_s, num_steps = time.monotonic(), 0
        while engine.has_work:
            outputs += engine.step()
            num_steps += 1
        assert [tokens_of(outputs, f"r{index}") for index in range(5)] == [[7] * (3 + index) for index in range(5)]
        assert time.monotonic() - began_s >= 0.002 * num_steps
        assert len(hub.gaps_us) == num_steps + 1, "a time for every plan, and for what told the rank its cache"
        engine.check_integrity()


@pytest.mark.parametrize("step_s", [0.0, 0.001])
async def test_the_mock_engine_gives_each_request_a_token_a_step(step_s: float) -> None:
    engine = MockEngine(step_s, asyncio.get_running_loop())
    outputs: list[list[Output]] = []

    def run() -> None:
        while engine.has_work:
            outputs.append(engine.step())

    engine.add(request("a", 3))
    engine.add(request("b", NUM_TOKEN_IDS + 5))
    assert engine.abort("nobody") is False
    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.to_thread(thread.join)
    flat = [output for step in outputs for output in step]
    assert tokens_of(flat, "a") == [FIRST_TOKEN_ID, FIRST_TOKEN_ID + 1, FIRST_TOKEN_ID + 2]
    assert tokens_of(flat, "b")[-1] == FIRST_TOKEN_ID + 4
    assert [output.request_id for output in flat if output.finish_reason is FinishReason.LENGTH] == ["a", "b"]
    assert all(len(output.token_ids) == 1 for output in flat)
    assert len(outputs) == NUM_TOKEN_IDS + 5 == engine.stats().num_steps


def test_a_late_step_takes_nothing_from_those_behind_it() -> None:
    pace = Pace(0.5)
    assert pace.wait_s(100.0) == 0
    assert pace.wait_s(100.25) == 0.25
    assert [pace.wait_s(102.1) for _ in range(4)] == [0, 0, 0, pytest.approx(0.4)], "due at 101, 101.5, 102 and 102.5"
    pace.rest()
    assert (pace.wait_s(200.0), pace.wait_s(200.0)) == (0, 0.5), "nothing was due while nothing ran"


@pytest.mark.timeout(60)
async def test_the_mock_engine_rests_when_nothing_runs() -> None:
    engine = MockEngine(3600.0, asyncio.get_running_loop())
    for name in ("a", "b"):
        engine.add(request(name, 1))
        assert tokens_of(list(engine.step()), name) == [FIRST_TOKEN_ID], "else it would wait for an hour"
        assert not engine.has_work


async def test_an_abort_ends_with_one_output() -> None:
    engine = MockEngine(0.001, asyncio.get_running_loop())
    engine.add(request("a", 100))
    engine.step()
    assert engine.abort("a")
    assert engine.step() == [Output("a", [], FinishReason.ABORT)]
    assert not engine.has_work
