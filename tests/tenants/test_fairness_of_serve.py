"""Fairness at ``remuda serve``: keys of two tenants, a leader and its rank; traces say how long a request waited."""

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fuzz.footprint import gauges
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.served import Served
from tests.tenants.front_ends import bearer, key_of

FLOOD, NUM_NEW, QUEUED = 120, 100, 100
NUM_SLOTS = 4
NUM_PROMPT_TOKENS = 150
"""Three steps' worth of those that a step may have."""
NUM_ASKED = 3
_WAIT_S = 60.0


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {
        "noisy": key_of(tmp_path, "noisy"),
        "quiet": key_of(tmp_path, "quiet"),
        "watching": key_of(tmp_path, "ops", "--scope", "metrics"),
    }


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


class Site:
    """A served cluster with keys, as its clients see it."""

    def __init__(self, client: httpx.AsyncClient, keys: dict[str, str], collector: OtlpReceiver) -> None:
        self._client, self._keys, self._collector = client, keys, collector
        self._num_asked = 0

    async def steps_to_first_token(self) -> int:
        """Of a request of the quiet tenant, with a prompt that no cache has."""
        self._num_asked += 1
        prompt = [300 + self._num_asked] * NUM_PROMPT_TOKENS
        trace_id = secrets.token_hex(16)
        headers = {**bearer(self._keys["quiet"]), "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
        assert await self._num_new(prompt, 3, headers) == 3
        spans = await asyncio.to_thread(self._collector.trace, trace_id, ["queue", "prefill"])
        phases = {span.name: span.attributes["remuda.num_steps"] for span in spans if span.name in ("queue", "prefill")}
        return int(sum(phases.values()))

    async def flood(self, number: int) -> int:
        """One request of it: how many tokens it got."""
        return await self._num_new([400 + number] * 5, NUM_NEW, bearer(self._keys["noisy"]))

    async def num_waiting(self) -> float:
        values = await gauges(self._client, bearer(self._keys["watching"]))
        (waiting,) = [value for name, value in values.items() if name.startswith("remuda_num_requests_waiting")]
        return waiting

    async def _num_new(self, prompt: list[int], num_new: int, headers: dict[str, str]) -> int:
        body = {"model": "remuda-tiny", "prompt": prompt, "max_tokens": num_new, "ignore_eos": True}
        answer = await self._client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["completion_tokens"])


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_a_single_request_beside_a_hundred_long_ones_gets_its_first_token_soon(
    tmp_path: Path, keys: dict[str, str], collector: OtlpReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: tuple[str, ...] = ("remuda-tiny", "--max-num-seqs", str(NUM_SLOTS), "--max-num-batched-tokens", "64")
    arguments += ("--api-key-file", str(tmp_path / "keys"), "--otlp-endpoint", collector.endpoint)
    limits = httpx.Limits(max_connections=2 * FLOOD)
    server = await asyncio.to_thread(Served(arguments, tmp_path / "serve.log").__enter__)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=240, trust_env=False, limits=limits) as client:
            site = Site(client, keys, collector)
            alone = await site.steps_to_first_token()
            flooding = [asyncio.create_task(site.flood(number)) for number in range(FLOOD)]
            async with asyncio.timeout(_WAIT_S):
                while await site.num_waiting() < QUEUED:  # noqa: ASYNC110  the server has no event for it
                    await asyncio.sleep(0.02)
            beside = []
            for _ in range(NUM_ASKED):
                beside.append(await site.steps_to_first_token())
                assert await site.num_waiting() > QUEUED // 4, "the flood waits still"
            with capsys.disabled():
                print(f"\nsteps to the first token: {alone} alone, {beside} beside {FLOOD} of {NUM_NEW} tokens")
            assert alone >= 3 and max(beside) <= 2 * alone + 2, (alone, beside)
            assert await asyncio.gather(*flooding) == [NUM_NEW] * FLOOD, "and the flood loses nothing"
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)
