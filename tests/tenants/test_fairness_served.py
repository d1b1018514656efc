"""Fairness at a running server: HTTP, keys of two tenants, the engine computing remuda-tiny."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from cluster.identity.config import SecurityConfig
from engine.request import Output, Request
from tests.frontend.bodies import completion
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import TINY, Served, served
from tests.tenants.front_ends import bearer, key_of

FLOOD = 100
NUM_NEW = 3
MANY = httpx.Limits(max_connections=2 * FLOOD)
PROMPT = "Once upon a time there was a horse that nobody could ride, " * 6


class CountingBackend(RealBackend):
    """Notes, for each tenant's latest request, in how many steps its first token came."""

    def __init__(self) -> None:
        super().__init__(TINY, kv_cache_bytes=8 * 2**20)
        self.steps_to_first_token: dict[str, int] = {}
        self.num_taken = 0
        self.may_step = asyncio.Event()
        self.may_step.set()

    async def _step(self) -> None:
        await self.may_step.wait()
        await super()._step()

    async def generate(
        self, request: Request, keep: object = None, holder: object = None
    ) -> AsyncGenerator[Output, None]:
        self.num_taken += 1
        began = self._engine.stats().num_steps
        self.steps_to_first_token.pop(request.tenant.name, None)
        async for output in super().generate(request, keep, holder):
            if output.token_ids and request.tenant.name not in self.steps_to_first_token:
                self.steps_to_first_token[request.tenant.name] = self._engine.stats().num_steps - began
            yield output


async def first_token_steps(one: Served, backend: CountingBackend, key: str) -> int:
    body = completion(prompt=PROMPT, max_tokens=3)
    answer = await one.http.post("/v1/completions", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return backend.steps_to_first_token["quiet"]


async def test_a_single_request_beside_a_hundred_gets_its_first_token_soon(tmp_path: Path) -> None:
    noisy, quiet = key_of(tmp_path, "noisy"), key_of(tmp_path, "quiet")
    security = SecurityConfig.model_validate({"api_keys": {"file": tmp_path / "keys"}})
    backend: Any = CountingBackend()
    async with (
        served(backend, security=security) as one,
        httpx.AsyncClient(
            base_url=one.url, timeout=60, trust_env=False, limits=httpx.Limits(max_connections=2 * FLOOD)
        ) as client,
    ):
        alone = await first_token_steps(one, backend, quiet)

        async def flood(number: int) -> int:
            body = completion(prompt=f"{number} horses", max_tokens=NUM_NEW, ignore_eos=True)
            answer = await client.post("/v1/completions", json=body, headers=bearer(noisy))
            return int(json.loads(answer.text)["usage"]["completion_tokens"])

        backend.may_step.clear()
        flooding = [asyncio.create_task(flood(number)) for number in range(FLOOD)]
        async with asyncio.timeout(20):
            while backend.num_taken < FLOOD + 1:  # noqa: ASYNC110  it is others' tasks that are waited for
                await asyncio.sleep(0)
            backend.may_step.set()
            began = backend._engine.stats().num_steps
            while backend._engine.stats().num_steps < began + 5:  # noqa: ASYNC110  as above
                await asyncio.sleep(0)
        assert backend._engine.stats().num_waiting > FLOOD - 10
        beside = await first_token_steps(one, backend, quiet)
        assert alone > 1 and beside <= 2 * alone + 2, (alone, beside)
        assert await asyncio.gather(*flooding) == [NUM_NEW] * FLOOD, "and the flood loses nothing"
