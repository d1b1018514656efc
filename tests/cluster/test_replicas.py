"""Several replicas under Ray Serve: two start, one is rolled while it streams, load brings a third, and what fails is
replaced."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served import Served, listening_addresses, run_remuda

MAX_NUM_SEQS = 1
REPLACED_WITHIN_S = 90.0


pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log: Path = tmp_path_factory.mktemp("replicas") / "serve.log"
    arguments = ("remuda-tiny", "--replicas", "2", "--max-replicas", "3", "--max-num-seqs", str(MAX_NUM_SEQS))
    with Served((*arguments, "--drain-timeout", "20"), log) as server:
        yield server


def ids(served: Served, state: str = "ready") -> set[str]:
    return {replica["id"] for replica in served.status()["replicas"] if replica["state"] == state}


def wait_for(condition: Callable[[], Any], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so within {timeout_s} s"
        time.sleep(0.2)


def generate(served: Served, num_tokens: int) -> dict[str, Any]:
    """One greedy completion of a fixed prompt."""
    body = {"prompt": [300, 301, 302], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": "remuda-tiny", **body}, timeout=120)
    assert answer.status_code == httpx.codes.OK, answer.text
    completion: dict[str, Any] = answer.json()
    assert completion["usage"]["completion_tokens"] == num_tokens
    return completion


def text(served: Served) -> str:
    found: str = generate(served, 8)["choices"][0]["text"]
    return found


class Load:
    """So many clients, each with one request at a time, until ``stop``."""

    def __init__(self, served: Served, num_clients: int) -> None:
        self._served = served
        self._is_over = False
        self._pool = concurrent.futures.ThreadPoolExecutor(num_clients)
        self._clients = [self._pool.submit(self._run) for _ in range(num_clients)]

    def _run(self) -> int:
        count = 0
        while not self._is_over:
            generate(self._served, 200)
            count += 1
        return count

    def stop(self) -> int:
        """How many requests there were; none may have failed."""
        self._is_over = True
        with self._pool:
            return sum(client.result(120) for client in self._clients)


def ranks(replicas: Served) -> dict[str, list[int]]:
    """Process ids of each replica's ranks."""
    return {replica["id"]: [rank["pid"] for rank in replica["ranks"]] for replica in replicas.status()["replicas"]}


def test_replicas_start_roll_and_follow_the_load(replicas: Served) -> None:
    assert ids(replicas) == {"r0", "r1"}
    # Equals have work in turn.
    assert {text(replicas) for _ in range(6)} == {text(replicas)}
    assert all(replica["num_steps"] > 0 for replica in replicas.status()["replicas"])
    assert {address for _, address in listening_addresses(replicas.mark)} <= {"127.0.0.1", "::1"}

    load = Load(replicas, num_clients=1)
    drained = run_remuda("drain", "r0", "--target", replicas.target)
    assert drained.returncode == 0, drained.stderr
    wait_for(lambda: ids(replicas) == {"r1", "r2"}, REPLACED_WITHIN_S)
    assert load.stop() > 0

    load = Load(replicas, num_clients=8)
    wait_for(lambda: len(ids(replicas)) == 3, REPLACED_WITHIN_S)
    assert load.stop() > 0
    assert ids(replicas) == {"r1", "r2", "r3"}


def test_a_replica_that_loses_a_rank_is_repaired_not_replaced(replicas: Served) -> None:
    before = ranks(replicas)
    victim, expected = min(before), text(replicas)
    psutil.Process(before[victim][0]).kill()
    assert {text(replicas) for _ in range(4)} == {expected}, "the others go on"
    assert httpx.get(f"{replicas.url}/readyz").status_code == httpx.codes.OK
    wait_for(lambda: ranks(replicas)[victim][0] != before[victim][0], REPLACED_WITHIN_S)
    assert ids(replicas) == set(before), "it is the same replica"
    assert {text(replicas) for _ in range(4)} == {expected}


def test_nothing_is_left(replicas: Served) -> None:
    """The last of this module."""
    assert replicas.stop() == 0
    assert replicas.left_processes() == []
