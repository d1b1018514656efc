"""Usage is counted once: across a replica that fails, and a client that comes back to another front end."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.errors import Draining
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

NUM_TOKENS = 400


class SmallVocabulary(ScriptedEngine):
    """Its tokens are remuda-tiny's."""

    def step(self, news: Callable[[], None] = lambda: None) -> list[Output]:
        return [
            msgspec.structs.replace(output, token_ids=[300 + token_id % 700 for token_id in output.token_ids])
            for output in super().step(news)
        ]


class Halting(SmallVocabulary):
    """Stands still after some steps, until somebody opens its gate."""

    def step(self, news: Callable[[], None] = lambda: None) -> list[Output]:
        if self.num_steps == 20:
            self.gate.clear()
        return super().step(news)


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


def lines_of(folder: Path) -> list[dict[str, Any]]:
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
    (line,) = lines_of(tmp_path)
    assert line["num_completion_tokens"] == 3000 and line["outcome"] == "completed"


async def test_a_client_that_comes_back_to_another_front_end(tmp_path: Path, redis_server: RedisServer) -> None:
    key, stranger = key_of(tmp_path, "one"), key_of(tmp_path, "two")
    store = {"limits_store": redis_server.url, "limits_store_password_file": redis_server.password_file}
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(SmallVocabulary()))
        first = await stack.enter_async_context(front_end_of([bed], tmp_path, "first", **store))
        second = await stack.enter_async_context(front_end_of([bed], tmp_path, "second", **store))
        body = completion(max_tokens=NUM_TOKENS, ignore_eos=True, stream=True)
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
        assert (total["num_requests"], total["num_completion_tokens"]) == (1, NUM_TOKENS)
    (line,) = lines_of(tmp_path)
    assert line["num_completion_tokens"] == NUM_TOKENS and last_id.startswith(line["request_id"])
    assert (tmp_path / "first.jsonl").read_text() == "", "also when the first front end has stopped"


@asynccontextmanager
async def cut_in_two(one: Served, bed: Bed, key: str) -> AsyncIterator[tuple[AsyncIterator[str], dict[str, str]]]:
    """A resumable stream whose engine stands still, read up to its first event: its further lines, and the headers with
    which its client comes back."""
    body = completion(max_tokens=NUM_TOKENS, ignore_eos=True, stream=True)
    headers = bearer(key) | {"remuda-resumable": "1"}
    async with one.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.aiter_lines()
        async for text in lines:
            if text.startswith("id: "):
                await until(lambda: not bed.engine.gate.is_set())
                yield lines, bearer(key) | {"last-event-id": text.removeprefix("id: ")}
                break


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_client_that_comes_back_before_its_first_connection_has_ended(
    where: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    key = key_of(tmp_path, "one")
    (tmp_path / "tenants.yaml").write_text("tenants: {one: {max_concurrent_requests: 1}}")
    store = {"limits_store": redis_server.url, "limits_store_password_file": redis_server.password_file}
    store["tenants_file"] = tmp_path / "tenants.yaml"
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(Halting()))
        first = await stack.enter_async_context(front_end_of([bed], tmp_path, "first", **store))
        second = first
        if where == "elsewhere":
            second = await stack.enter_async_context(front_end_of([bed], tmp_path, "second", **store))
        async with cut_in_two(first, bed, key) as (lines, headers):
            again = asyncio.create_task(second.http.post("/v1/completions", headers=headers))
            rest = [text async for text in lines]
            assert any('"code":"taken_over"' in text for text in rest)
        busy = await second.http.post("/v1/completions", json=completion(max_tokens=1), headers=bearer(key))
        assert busy.status_code == 429, "the request runs"
        bed.engine.gate.set()
        assert (await again).status_code == 200
        (total,) = await usage(second, key)
        assert (total["num_requests"], total["num_completion_tokens"]) == (1, NUM_TOKENS)
    (line,) = lines_of(tmp_path)
    assert (line["num_completion_tokens"], line["outcome"]) == (NUM_TOKENS, "completed")


async def test_a_front_end_that_stops_and_one_that_is_asked_for_the_end_again(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    key = key_of(tmp_path, "one")
    store = {"limits_store": redis_server.url, "limits_store_password_file": redis_server.password_file}
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(serving(Halting()))
        first = await stack.enter_async_context(front_end_of([bed], tmp_path, "first", **store))
        second = await stack.enter_async_context(front_end_of([bed], tmp_path, "second", **store))
        async with cut_in_two(first, bed, key) as (lines, headers):
            first.front_end.service.end_all(Draining("the server stops"))
            rest = [text async for text in lines]
            assert any('"code":"draining"' in text for text in rest)
        assert await usage(first, key) == [], "it may be gone on with"
        bed.engine.gate.set()
        for each in (second, first, second):
            assert (await each.http.post("/v1/completions", headers=headers)).status_code == 200
            (total,) = await usage(each, key)
            assert (total["num_requests"], total["num_completion_tokens"]) == (1, NUM_TOKENS)
    (line,) = lines_of(tmp_path)
    assert line["num_completion_tokens"] == NUM_TOKENS
