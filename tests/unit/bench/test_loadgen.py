"""The load generator against a server whose every token and delay is known."""

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.load_cases import PromptMaker, parse_case
from bench.loadgen import LoadFailed, LoadGenerator, Repetition, summary

FIRST_TOKEN_DELAY_S = 0.05
TOKEN_DELAY_S = 0.005


class KnownServer:
    """Answers every request with ``max_tokens`` chunks at a known pace, and remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.num_active = 0
        self.most_active = 0
        self.failing = False

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.failing:
            return web.json_response({"error": {"message": "no"}}, status=503)
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(TOKEN_DELAY_S if i else FIRST_TOKEN_DELAY_S)
            await self._send(response, {"choices": [{"text": "x", "finish_reason": None}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self._send(response, {"choices": [], "usage": usage})
        self.num_active -= 1  # before the end is seen: the client's next request may be here before we go on
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, object]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
async def server() -> AsyncIterator[tuple[KnownServer, str]]:
    known = KnownServer()
    app = web.Application()
    app.router.add_post("/v1/completions", known.complete)
    async with TestServer(app) as running:
        yield known, str(running.make_url("/"))


async def test_a_closed_loop_asks_for_what_the_case_says(server: tuple[KnownServer, str], seed: int) -> None:
    known, url = server
    repetition = await LoadGenerator(url, "m", [5, 6, 7], seed).run(parse_case("c3"))
    assert repetition.num_requests == len(known.bodies) == 6
    assert known.most_active == 3
    for body in known.bodies:
        prompt = body["prompt"]
        assert isinstance(prompt, list)
        assert len(prompt) == 128
        assert set(prompt) <= {5, 6, 7}
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (64, 0, True, True)


async def test_times_are_the_servers(server: tuple[KnownServer, str], seed: int) -> None:
    _, url = server
    repetition = await LoadGenerator(url, "m", [5], seed).run(parse_case("c1"))
    # Sleeping ends late, never early.
    assert repetition.ttft_p50_s >= FIRST_TOKEN_DELAY_S
    assert repetition.tpot_p50_s >= TOKEN_DELAY_S
    assert repetition.wall_s >= 4 * (FIRST_TOKEN_DELAY_S + 63 * TOKEN_DELAY_S)
    assert repetition.out_tok_s == pytest.approx(4 * 64 / repetition.wall_s)
    assert repetition.in_tok_s == pytest.approx(4 * 128 / repetition.wall_s)
    assert repetition.other_cores is None


async def test_a_shared_case_sends_one_request_ahead(server: tuple[KnownServer, str], seed: int) -> None:
    known, url = server
    repetition = await LoadGenerator(url, "m", list(range(100)), seed).run(parse_case("shared2"))
    prompts = [tuple(body["prompt"]) for body in known.bodies if isinstance(body["prompt"], list)]
    assert len(prompts) == 1 + 4
    assert len({prompt[:768] for prompt in prompts}) == 1
    assert len({prompt[768:] for prompt in prompts}) == 5
    assert repetition.first_ttft_s is not None
    assert repetition.first_ttft_s >= FIRST_TOKEN_DELAY_S


async def test_a_refusal_ends_the_measurement(server: tuple[KnownServer, str], seed: int) -> None:
    known, url = server
    known.failing = True
    with pytest.raises(LoadFailed, match="answered 503: no"):
        await LoadGenerator(url, "m", [5], seed).run(parse_case("c1"))


async def test_a_case_that_takes_too_long_ends_the_measurement(server: tuple[KnownServer, str], seed: int) -> None:
    """Four requests one after another, of 0.3 s each."""
    _, url = server
    with pytest.raises(LoadFailed, match="c1 was not over in 0.3 s"):
        await LoadGenerator(url, "m", [5], seed, limit_s=0.3).run(parse_case("c1"))


def test_each_repetition_shares_something_new(seed: int) -> None:
    generator = random.Random(seed)
    case = parse_case("shared1")
    first, second = (PromptMaker(case, range(1000), generator).prompt() for _ in range(2))
    assert first[:768] != second[:768]


@pytest.mark.parametrize("name", ["c0", "c", "8", "short8", "c-1"])
def test_an_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use cN, longN or sharedN"):
        parse_case(name)


def _repetition(out_tok_s: float, other_cores: float) -> Repetition:
    return Repetition(4, out_tok_s, 0, 0, 0, 0, 0, 0, 0, 1, 0, other_cores)


def test_disturbed_repetitions_do_not_count() -> None:
    result = summary([_repetition(10, 0.1), _repetition(99, 0.9), _repetition(20, 0.0)])
    assert result["num_clean"] == 2
    assert result["out_tok_s_spread"] == [10, 20]
    least = summary([_repetition(10, 0.9), _repetition(20, 0.5)])
    assert (least["num_clean"], least["out_tok_s_spread"]) == (0, [20, 20])
