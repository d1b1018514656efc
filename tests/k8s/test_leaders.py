"""The kubernetes package's own client against an API server: changes arrive, watches resume, old versions list anew."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes import client

from cluster.k8s.endpoint_slices import ServiceName
from cluster.k8s.leaders import KubernetesLeaders
from cluster.k8s.object_watch import PAGE_SIZE
from tests.k8s.api_server import ApiServer, serve_api
from tests.k8s.objects import NODES, SERVICE, SLICES, endpoint, endpoint_slice, node
from tests.support.leader_bed import until

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
        self.num_told = 0
        """How often, of nodes."""
        self._told = asyncio.Event()

    def take_leaders(self, leaders: dict[str, str]) -> None:
        self.leaders = leaders
        self._told.set()

    def take_leaving(self, leaving: dict[str, str]) -> None:
        self.leaving = leaving
        self.num_told += 1
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
    leaders = KubernetesLeaders(ServiceName("llm", SERVICE), seen.take_leaders, seen.take_leaving, True, calls)
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
            await seen.until(lambda seen: seen.leaders == {"llama-0": "10.0.0.7:9052"})
            api.put(SLICES, endpoint_slice("s-2", endpoint("llama-1", "10.0.0.8")))
            await seen.until(lambda seen: len(seen.leaders or {}) == 2)
            api.delete(SLICES, "s-1")
            await seen.until(lambda seen: seen.leaders == {"llama-1": "10.0.0.8:9052"})

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
            await seen.until(lambda seen: seen.leaders == {"llama-1": "10.0.0.8:9052"})

    asyncio.run(scenario())


def test_leaders_stay_while_the_api_server_is_away(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with ExitStack() as served:
            api = served.enter_context(serve_api())
            api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7")))
            async with followed(api) as seen:
                await seen.until(lambda seen: len(seen.leaders or {}) == 1)
                served.close()
                await until(lambda: "the API server cannot be reached" in caplog.text)
                assert seen.leaders == {"llama-0": "10.0.0.7:9052"}
                api.put(SLICES, endpoint_slice("s-2", endpoint("llama-1", "10.0.0.8")))
                served.enter_context(serve_api(before=api))
                await seen.until(lambda seen: len(seen.leaders or {}) == 2)

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


def test_a_replica_leaves_with_the_node_of_any_of_its_pods_and_when_its_leader_ends(api: ApiServer) -> None:
    async def scenario() -> None:
        for name in ("gpu-1", "gpu-2"):
            api.put(NODES, node(name))
        workers = endpoint_slice("s-2", endpoint("llama-0-1", "10.0.0.9", "gpu-2"))
        del workers["ports"][1]
        api.put(SLICES, workers)
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7", "gpu-1")))
        async with followed(api) as seen:
            await seen.until(lambda seen: seen.leaders == {"llama-0": "10.0.0.7:9052"})
            api.put(NODES, node("gpu-2", unschedulable=True))
            await seen.until(lambda seen: seen.leaving == {"llama-0": "cordoned"})
            api.put(NODES, node("gpu-2"))
            await seen.until(lambda seen: seen.leaving == {})
            ending = endpoint("llama-0", "10.0.0.7", "gpu-1", ready=False, terminating=True)
            api.put(SLICES, endpoint_slice("s-1", ending))
            await seen.until(lambda seen: seen.leaving == {"llama-0": "about to end"})
            assert seen.leaders == {"llama-0": "10.0.0.7:9052"}

    asyncio.run(scenario())


def test_a_replica_whose_worker_ends_is_about_to_leave_until_that_pod_is_gone(api: ApiServer) -> None:
    """Its ranks compute until the end of the grace period; then the replica would stand still."""

    async def scenario() -> None:
        leaders = endpoint("llama-0", "10.0.0.7"), endpoint("llama-1", "10.0.0.8")
        api.put(SLICES, endpoint_slice("s-1", *leaders))
        workers = endpoint_slice("s-2", endpoint("llama-0-1", "10.0.0.9"), endpoint("llama-1-1", "10.0.0.6"))
        del workers["ports"][1]
        api.put(SLICES, workers)
        async with followed(api) as seen:
            await seen.until(lambda seen: len(seen.leaders or {}) == 2 and seen.leaving == {})
            ending = endpoint("llama-1-1", "10.0.0.6", ready=False, terminating=True)
            api.put(SLICES, {**workers, "endpoints": [workers["endpoints"][0], ending]})
            await seen.until(lambda seen: seen.leaving == {"llama-1": "about to end"})
            api.put(SLICES, {**workers, "endpoints": [workers["endpoints"][0]]})
            await seen.until(lambda seen: seen.leaving == {})
            assert seen.leaders == {"llama-0": "10.0.0.7:9052", "llama-1": "10.0.0.8:9052"}

    asyncio.run(scenario())


def test_an_answer_that_is_no_json_ends_nothing(api: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7")))
        api.is_garbled = True
        async with followed(api) as seen:
            await until(lambda: "was not understood" in caplog.text)
            assert seen.leaders is None
            api.is_garbled = False
            await seen.until(lambda seen: seen.leaders == {"llama-0": "10.0.0.7:9052"})

    asyncio.run(scenario())


def test_the_nodes_of_a_large_cluster_come_in_pages(api: ApiServer) -> None:
    async def scenario() -> None:
        for number in range(2 * PAGE_SIZE + 7):
            api.put(NODES, node(f"gpu-{number}", unschedulable=number == 2 * PAGE_SIZE + 3))
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7", f"gpu-{2 * PAGE_SIZE + 3}")))
        async with followed(api) as seen:
            await seen.until(lambda seen: seen.leaving == {"llama-0": "cordoned"})
        lists = [path for path in api.requests if path.startswith(NODES) and "watch" not in path]
        asked = [parse_qs(urlsplit(path).query) for path in lists]
        assert [one.get("continue") for one in asked] == [None, ["100"], ["200"]]

    asyncio.run(scenario())


def test_nobody_is_told_of_a_status(api: ApiServer) -> None:
    """Each node of a cluster reports its own every few minutes."""

    async def scenario() -> None:
        api.put(NODES, node("gpu-1"))
        api.put(SLICES, endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7", "gpu-1")))
        async with followed(api) as seen:
            await seen.until(lambda seen: seen.num_told == 2)  # the slices and the nodes, as they are
            api.put(NODES, {**node("gpu-1"), "status": {"phase": "Running"}})
            api.put(NODES, node("gpu-1", unschedulable=True))
            await seen.until(lambda seen: seen.leaving == {"llama-0": "cordoned"})
            assert seen.num_told == 3

    asyncio.run(scenario())
