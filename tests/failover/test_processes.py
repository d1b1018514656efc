"""Processes are killed while streams run: leaders, front ends, connections. What clients get is compared, token by
token, with what they get when nothing happens."""

import concurrent.futures
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.rpc.generated.remuda.v1 import inference_pb2
from cluster.rpc.inference_client import GenerateOptions, InferenceClient
from tests.failover.processes import Cluster, FrontEndProcess, cluster_of
from tests.failover.requests import PROMPT, REQUESTS, assert_same
from tests.failover.streams import Reading, read

pytestmark = pytest.mark.timeout(120)


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
        name = next(call).request_id
        other._inference.Cancel(inference_pb2.CancelRequest(request_id=name), timeout=10)
        _wait_until_cancelled(first, before + 2)
        with pytest.raises(grpc.RpcError) as cancelled:
            list(call)
        assert cancelled.value.code() == grpc.StatusCode.CANCELLED
        with pytest.raises(grpc.RpcError) as unknown:
            other._inference.Cancel(inference_pb2.CancelRequest(request_id="nobody"), timeout=10)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def _num_cancelled(front_end: FrontEndProcess) -> int:
    """By a client that left (cancelled) and by who knew the name (Cancelled)."""
    text = httpx.get(f"{front_end.url}/metrics").text
    found = re.findall(r'^remuda_requests_total\{model_name="m",outcome="[Cc]ancelled"\} (\d+)', text, re.MULTILINE)
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
