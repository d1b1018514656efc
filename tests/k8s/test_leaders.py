"""The kubernetes package's own client against an API server: changes arrive, watches resume, old versions list anew."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from kubernetes import client

from cluster.k8s.endpoint_slices import ServiceName
from cluster.k8s.leaders import KubernetesLeaders
from tests.k8s.api_server import ApiServer, serve_api
from tests.k8s.objects import NODES, SERVICE, SLICES, endpoint, endpoint_slice, node

TIMEOUT_S = 20.0


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with serve_api() as server:
        yield server


class Seen:
    """The newest of each that was told."""

    def __init__(self) -> None:
        self.leaders: dict[str, str] | None = None
        self.leaving: dict[str, str] = {}
        self._told = asyncio.Event()

    def take_leaders(self, leaders: dict[str, str]) -> None:
        self.leaders = leaders
        self._told.set()

    def take_leaving(self, leaving: dict[str, str]) -> None:
        self.leaving = leaving
        self._told.set()

    async def until(self, is_true: Callable[["Seen"], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not is_true(self):
                self._told.clear()
                await self._told.wait()


@asynccontextmanager
async def followed(api: ApiServer) -> AsyncIterator[Seen]:
    seen = Seen()
    calls = client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{api.port}"))
    leaders = KubernetesLeaders(ServiceName("llm", SERVICE), seen.take_leaders, seen.take_leaving, calls)
    leaders.start()
    try:
        yield seen
    finally:
        leaders.stop()
        api.cut_watches()


def test_leaders_come_change_and_go(api: ApiServer) -> None:
    async def scenario() -> None:
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7")))
        api.put(SLICES, endpoint_slice("other", endpoint("qwen-0", "10.0.0.9"), service="qwen"))
        async with followed(api) as seen:
            await seen.until(lambda seen: seen.leaders == {"llama-0": "10.0.0.7:50052"})
            api.put(SLICES, endpoint_slice("s-2", endpoint("llama-1", "10.0.0.8")))
            await seen.until(lambda seen: len(seen.leaders or {}) == 2)
            api.delete(SLICES, "s-1")
            await seen.until(lambda seen: seen.leaders == {"llama-1": "10.0.0.8:50052"})

    asyncio.run(scenario())


def test_a_watch_that_is_cut_off_resumes_where_it_was(api: ApiServer) -> None:
    async def scenario() -> None:
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7")))
        async with followed(api) as seen:
            await seen.until(lambda seen: len(seen.leaders or {}) == 1)
            api.put(SLICES, endpoint_slice("s-2", endpoint("llama-1", "10.0.0.8")))
            await seen.until(lambda seen: len(seen.leaders or {}) == 2)
            num_lists = sum("watch" not in path for path in api.requests)
            api.cut_watches()
            api.put(SLICES, endpoint_slice("s-3", endpoint("llama-2", "10.0.0.9")))
            await seen.until(lambda seen: len(seen.leaders or {}) == 3)
            assert sum("watch" not in path for path in api.requests) == num_lists

    asyncio.run(scenario())


def test_what_happened_before_the_oldest_version_is_listed_anew(api: ApiServer) -> None:
    async def scenario() -> None:
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7")))
        async with followed(api) as seen:
            await seen.until(lambda seen: len(seen.leaders or {}) == 1)
            api.delete(SLICES, "s-1")
            await seen.until(lambda seen: seen.leaders == {})
            api.forget()
            api.cut_watches()
            api.put(SLICES, endpoint_slice("s-2", endpoint("llama-1", "10.0.0.8")))
            await seen.until(lambda seen: seen.leaders == {"llama-1": "10.0.0.8:50052"})

    asyncio.run(scenario())


def test_leaders_on_a_cordoned_node_are_about_to_leave(api: ApiServer) -> None:
    async def scenario() -> None:
        api.put(NODES, node("gpu-1"))
        api.put(NODES, node("gpu-2"))
        both = endpoint("llama-0", "10.0.0.7", "gpu-1"), endpoint("llama-1", "10.0.0.8", "gpu-2")
        api.put(SLICES, endpoint_slice("s-1", *both))
        async with followed(api) as seen:
            await seen.until(lambda seen: len(seen.leaders or {}) == 2)
            api.put(NODES, node("gpu-2", unschedulable=True))
            await seen.until(lambda seen: seen.leaving == {"llama-1": "cordoned"})
            api.put(NODES, node("gpu-2"))
            await seen.until(lambda seen: seen.leaving == {})

    asyncio.run(scenario())
