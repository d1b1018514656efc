"""Usage is counted once: across a replica that fails, and a client that comes back to another front end."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from cluster.frontend.fleet import Fleet
from cluster.identity.config import SecurityConfig
from cluster.replica.client import ReplicaClient
from cluster.tenants.tenancy import TenancyConfig
from engine.errors import RankFailure
from engine.request import Output
from tests.frontend.bodies import completion
from tests.frontend.servers import Served, served
from tests.support.leader_bed import Bed, serving
from tests.support.scripted_engine import ScriptedEngine
from tests.tenants.front_ends import bearer, key_of
from tests.tenants.redis_server import RedisServer
from tests.tenants.test_served import usage


class SmallVocabulary(ScriptedEngine):
    """Its tokens are remuda-tiny's."""

    def step(self, news: Callable[[], None] = lambda: None) -> list[Output]:
        return [
            msgspec.structs.replace(output, token_ids=[300 + token_id % 700 for token_id in output.token_ids])
            for output in super().step(news)
        ]


@asynccontextmanager
async def front_end_of(beds: list[Bed], folder: Path, name: str, **tenancy: Any) -> AsyncIterator[Served]:
    fleet = Fleet()
    security = SecurityConfig.model_validate({"api_keys": {"file": folder / "keys"}})
    config = TenancyConfig(usage_log=folder / f"{name}.jsonl", **tenancy)
    try:
        for index, bed in enumerate(beds):
            await fleet.add(f"r{index}", ReplicaClient(bed.address, name))
        async with served(fleet, security=security, tenancy=config) as one:
            yield one
    finally:
        await fleet.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  it is another thread's doing
            await asyncio.sleep(0.002)


async def test_a_replica_that_fails_under_a_request(tmp_path: Path) -> None:
    key = key_of(tmp_path, "one")
    async with AsyncExitStack() as stack:
        beds = [await stack.enter_async_context(serving(SmallVocabulary())) for _ in range(2)]
        one = await stack.enter_async_context(front_end_of(beds, tmp_path, "first"))
        body = completion(max_tokens=3000, ignore_eos=True)
        asked = asyncio.create_task(one.http.post("/v1/completions", json=body, headers=bearer(key)))
        await until(lambda: any(bed.engine.num_steps > 20 for bed in beds))
        (busy,) = [bed for bed in beds if bed.engine.num_steps]
        busy.engine.fails_with = RankFailure("rank 1 died", rank=1)
        answer = (await asked).json()
        assert answer["usage"]["completion_tokens"] == 3000
        assert all(bed.engine.num_steps for bed in beds), "it went on at the other"
        (total,) = await usage(one, key)
        assert (total["num_requests"], total["num_completion_tokens"]) == (1, 3000)
        assert total["num_prompt_tokens"] == answer["usage"]["prompt_tokens"]
    (line,) = lines(tmp_path)
    assert line["num_completion_tokens"] == 3000 and line["outcome"] == "completed"


async def test_a_client_that_comes_back_to_another_front_end(tmp_path: Path, redis_server: RedisServer) -> None:
    key, stranger = key_of(tmp_path, "one"), key_of(tmp_path, "two")
    store = {"limits_store": redis_server.url, "limits_store_password_file": redis_server.password_file}
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(SmallVocabulary()))
        first = await stack.enter_async_context(front_end_of([bed], tmp_path, "first", **store))
        second = await stack.enter_async_context(front_end_of([bed], tmp_path, "second", **store))
        body = completion(max_tokens=400, ignore_eos=True, stream=True)
        headers = bearer(key) | {"remuda-resumable": "1"}
        last_id = ""
        async with first.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            async for text in response.aiter_lines():
                if text.startswith("id: "):
                    bed.engine.gate.clear()
                    last_id = text.removeprefix("id: ")
                    break
        for other, status in ((stranger, 404), (key, 200)):
            bed.engine.gate.set()
            headers = bearer(other) | {"last-event-id": last_id}
            answer = await second.http.post("/v1/completions", headers=headers)
            assert answer.status_code == status, "a request belongs to its tenant"
        (total,) = await usage(second, key)
        assert (total["num_requests"], total["num_completion_tokens"]) == (1, 400)
    (line,) = lines(tmp_path)
    assert line["num_completion_tokens"] == 400 and last_id.startswith(line["request_id"])
    assert (tmp_path / "first.jsonl").read_text() == "", "also when the first front end has stopped"
