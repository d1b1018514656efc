"""Processes are killed while streams run: leaders, front ends, connections. What clients get is compared, token by
token, with what they get when nothing happens."""

import asyncio
import concurrent.futures
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2
from cluster.rpc.inference_client import GenerateOptions, InferenceClient
from tests.failover.grpc_resume import NUM_TOKENS as GRPC_NUM_TOKENS
from tests.failover.grpc_resume import READERS, Answer
from tests.failover.processes import Cluster, FrontEndProcess, cluster_of, front_end, wait_ready
from tests.failover.requests import PROMPT, REQUESTS, assert_same
from tests.failover.streams import Reading, read
from tests.failover.wire import wire_to
from tests.support.leader_bed import until

pytestmark = pytest.mark.timeout(120)
PART_BYTES = 3000
"""Of an answer over gRPC that has three times as many."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    """Without a fault."""
    with cluster_of(1, 1, tmp_path_factory.mktemp("whole")) as whole:
        found = {name: read(whole.front_ends[0].url, body) for name, body in REQUESTS.items()}
    for name, reading in found.items():
        assert reading.is_done and not reading.errors, (name, reading.errors)
        assert len(reading.usage) == 1
        assert reading.num_tokens > 60, name
    assert found["tools"].choices[0].tool_calls
    return found


@pytest.fixture
def two_by_two(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_of(2, 2, tmp_path) as cluster:
        yield cluster


def test_a_leader_is_killed(two_by_two: Cluster, expected: dict[str, Reading]) -> None:
    """With every kind of request running on it, and clients that know nothing of it."""
    gate = threading.Barrier(len(REQUESTS) + 1, timeout=60)
    passed = threading.Event()

    def at_token_20(reading: Reading) -> None:
        if not passed.is_set() and reading.num_tokens >= 20 and not getattr(reading, "waited", False):
            reading.waited = True  # type: ignore[attr-defined]
            gate.wait()

    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        url = two_by_two.front_ends[0].url
        readings = {name: pool.submit(read, url, body, None, at_token_20, False) for name, body in REQUESTS.items()}
        gate.wait()
        two_by_two.leaders[0].kill()
        passed.set()
        for name, reading in readings.items():
            assert_same(reading.result(), expected[name])


@pytest.mark.parametrize("name", REQUESTS)
def test_a_connection_is_cut_and_the_client_comes_back(
    shared: Cluster, expected: dict[str, Reading], name: str
) -> None:
    """Every few events, to the other front end each time."""
    reading = Reading()
    for attempt in range(200):
        stop_at = reading.num_events + 25
        url = shared.front_ends[attempt % 2].url
        read(url, REQUESTS[name], reading, lambda found, at=stop_at: found.num_events < at)  # type: ignore[misc]
        if reading.is_done:
            break
    assert attempt > 1, "it was cut"
    assert_same(reading, expected[name])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(1, 2, tmp_path_factory.mktemp("shared")) as cluster:
        yield cluster


def test_a_front_end_is_killed(two_by_two: Cluster, expected: dict[str, Reading]) -> None:
    first, second = two_by_two.front_ends
    killed = threading.Event()
    gate = threading.Barrier(len(REQUESTS) + 1, timeout=60)

    def at_token_20(reading: Reading) -> None:
        if not killed.is_set() and reading.num_tokens >= 20:
            gate.wait()
            killed.wait()

    def run(body: dict[str, Any]) -> Reading:
        reading = read(first.url, body, None, at_token_20)
        return reading if reading.is_done else read(second.url, body, reading)

    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        readings = {name: pool.submit(run, body) for name, body in REQUESTS.items()}
        gate.wait()
        first.process.kill()
        first.process.wait()
        killed.set()
        for name, reading in readings.items():
            assert_same(reading.result(), expected[name])


@pytest.fixture(scope="module")
def whole_answers(shared: Cluster) -> dict[str, Answer]:
    """Over gRPC, without a fault."""
    found = {name: reader(shared.front_ends[0].target, lambda num_tokens: None) for name, reader in READERS.items()}
    for name, num_choices in (("command line", 1), ("two choices", 2)):
        assert [len(tokens) for tokens in found[name].tokens.values()] == [GRPC_NUM_TOKENS] * num_choices
        assert len(found[name].usage) == 1 and len(found[name].reasons) == num_choices
    return found


@pytest.mark.parametrize("name", READERS)
async def test_a_grpc_connection_is_cut_and_the_client_comes_back(
    shared: Cluster, whole_answers: dict[str, Answer], name: str
) -> None:
    """To the other front end each time."""
    targets, counts = [each.target for each in shared.front_ends], [0]
    async with wire_to(targets[0]) as wire:
        wire.budgets.extend([PART_BYTES] * 2)
        reading = asyncio.create_task(asyncio.to_thread(READERS[name], wire.address, counts.append))
        for number in (1, 2):
            await until(lambda: reading.done() or (wire.num_stalled == number and counts[-1] > 0))  # noqa: B023
            wire.target = targets[number % 2]
            wire.cut()
        assert await reading == whole_answers[name]
        assert wire.num_stalled == 2 and wire.num_connections > 2


async def test_a_front_end_is_killed_under_grpc_streams(shared: Cluster, whole_answers: dict[str, Answer]) -> None:
    """They come back through the same address, as behind a load balancer."""
    with ExitStack() as stack:
        victim = front_end(stack, shared.addresses, shared.directory / "killed-front-end.log")
        await asyncio.to_thread(wait_ready, victim, 1)
        async with wire_to(victim.target) as wire:
            wire.budgets.extend([PART_BYTES] * len(READERS))
            counts: dict[str, list[int]] = {name: [0] for name in READERS}
            readings = {
                name: asyncio.create_task(asyncio.to_thread(reader, wire.address, counts[name].append))
                for name, reader in READERS.items()
            }
            await until(lambda: wire.num_stalled == len(READERS) and all(each[-1] > 0 for each in counts.values()))
            wire.target = shared.front_ends[1].target
            victim.process.kill()
            for name, reading in readings.items():
                assert await reading == whole_answers[name]


def test_who_asks_for_what_nobody_has_is_told(shared: Cluster) -> None:
    url = f"{shared.front_ends[0].url}/v1/completions"
    answer = httpx.post(url, json={}, headers={"last-event-id": "cmpl-none/0.1.1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
    answer = httpx.post(url, json={}, headers={"last-event-id": "no id of ours"})
    assert answer.status_code == httpx.codes.BAD_REQUEST


def test_a_client_that_leaves_a_resumable_request_ends_its_work(shared: Cluster) -> None:
    """As Ctrl-C does, long before the grace time is over; and so does anybody who knows its name, at any front end."""
    first, second = shared.front_ends
    before = _num_cancelled(first)
    with (
        InferenceClient(f"127.0.0.1:{first.grpc_port}") as client,
        InferenceClient(f"127.0.0.1:{second.grpc_port}") as other,
    ):
        stream = client.generate(PROMPT, GenerateOptions(max_tokens=1900, temperature=0.0))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        _wait_until_cancelled(first, before + 1)

        request = inference_pb2.GenerateRequest(text=PROMPT, resumable=True)
        request.sampling.max_tokens = 1900
        call = client._inference.Generate(request)
        # Its start is told before a leader has it.
        name = next(each.request_id for each in call if each.HasField("delta"))
        other._inference.Cancel(inference_pb2.CancelRequest(request_id=name), timeout=10)
        _wait_until_cancelled(first, before + 2)
        with pytest.raises(grpc.RpcError) as cancelled:
            list(call)
        assert cancelled.value.code() == grpc.StatusCode.CANCELLED
        with pytest.raises(grpc.RpcError) as unknown:
            other._inference.Cancel(inference_pb2.CancelRequest(request_id="nobody"), timeout=10)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def _num_cancelled(front_end: FrontEndProcess) -> int:
    """By a client that left, and by who knew the name."""
    text = httpx.get(f"{front_end.url}/metrics").text
    found = re.findall(r'^remuda_requests_total\{model_name="m",outcome="cancelled"\} (\d+)', text, re.MULTILINE)
    return sum(map(int, found))


def _wait_until_cancelled(front_end: FrontEndProcess, number: int) -> None:
    """That many requests of its life were cancelled before their last token, and its replica runs none."""
    idle = 'remuda_num_requests_running{model_name="m"} 0.0'
    deadline_s = time.monotonic() + 20
    while _num_cancelled(front_end) < number or idle not in httpx.get(f"{front_end.url}/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_request_that_is_not_resumable_ends_with_its_connection(shared: Cluster) -> None:
    url = shared.front_ends[0].url
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    reading = read(url, body, None, lambda found: found.num_events < 3, resumable=False)
    assert reading.last_event_id is None and not reading.is_done
    deadline_s = time.monotonic() + 20
    while 'remuda_live_requests{model_name="m"} 0.0' not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    # Its name is in every chunk.
    answer = httpx.post(f"{url}/v1/completions", json={}, headers={"last-event-id": f"{reading.call_id}/0.1.1"})
    assert answer.status_code == httpx.codes.NOT_FOUND
