"""Ranks and leaders that die while they serve: only they are replaced, and streams go on with the same tokens."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served import Served, leader_of, processes_with, run_remuda

pytestmark = pytest.mark.timeout(240)

NUM_TOKENS = 400
REPAIR_TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log: Path = tmp_path_factory.mktemp("repaired") / "serve.log"
    arguments = ("remuda-tiny", "--tp", "2", "--dtype", "float32", "--spare-ranks", "1")
    with Served(arguments, log) as started:
        yield started
    assert started.left_processes() == []


class Stream(threading.Thread):
    """One streamed completion of NUM_TOKENS tokens."""

    def __init__(self, server: Served, **options: Any) -> None:
        super().__init__()
        self._server = server
        self._options = options
        self.token_ids: list[int] = []
        self.errors: list[str] = []
        self.begun = threading.Event()

    def run(self) -> None:
        body = {
            "model": "remuda-tiny",
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            **self._options,
        }
        with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.errors.append(chunk["error"]["message"])
                    continue
                for choice in chunk["choices"]:
                    self.token_ids += choice.get("token_ids") or []
                if len(self.token_ids) >= 10:
                    self.begun.set()


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0},
    {"prompt": "The little dog", "temperature": 1.0, "seed": 7},
]


def wait_until_served(server: Served) -> None:
    """A request is answered: the gang, and its leader, serve."""
    deadline_s = time.monotonic() + REPAIR_TIMEOUT_S
    while time.monotonic() < deadline_s:
        body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 2}
        if httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == httpx.codes.OK:
            return
        time.sleep(0.2)
    raise AssertionError(f"not repaired within {REPAIR_TIMEOUT_S:g} s:\n{server.log.read_text()}")


def streams_of(server: Served) -> list[Stream]:
    streams = [Stream(server, **options) for options in REQUESTS]
    for stream in streams:
        stream.start()
    return streams


@pytest.fixture(scope="module")
def unfaulted(server: Served) -> list[list[int]]:
    streams = streams_of(server)
    for stream in streams:
        stream.join(120)
    assert [len(stream.token_ids) for stream in streams] == [NUM_TOKENS] * len(streams)
    return [stream.token_ids for stream in streams]


def pids(server: Served) -> list[int]:
    return [rank["pid"] for rank in server.status()["replicas"][0]["ranks"]]


def assert_streams_outlive(strike: Callable[[], None], server: Served, unfaulted: list[list[int]]) -> None:
    """All of them have begun by then, and have the tokens of ``unfaulted`` in the end."""
    streams = streams_of(server)
    for stream in streams:
        assert stream.begun.wait(60)
    strike()
    for stream in streams:
        stream.join(REPAIR_TIMEOUT_S)
        assert not stream.is_alive()
    assert [stream.errors for stream in streams] == [[]] * len(streams)
    assert [stream.token_ids for stream in streams] == unfaulted


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_replaced_and_streams_go_on(server: Served, unfaulted: list[list[int]], victim: int) -> None:
    before = pids(server)
    assert_streams_outlive(partial(os.kill, before[victim], signal.SIGKILL), server, unfaulted)
    after = pids(server)
    assert after[1 - victim] == before[1 - victim], "the survivor keeps its process"
    assert after[victim] != before[victim]
    newcomer, survivor = (server.status()["replicas"][0]["ranks"][rank] for rank in (victim, 1 - victim))
    assert 0 < newcomer["weight_bytes_from_peers"] < newcomer["weight_bytes_from_disk"], "norms alone are on both"
    whole = survivor["weight_bytes_from_peers"] + survivor["weight_bytes_from_disk"]
    assert newcomer["weight_bytes_from_peers"] + newcomer["weight_bytes_from_disk"] == whole
    assert f"{newcomer['weight_bytes_from_peers']:,} bytes came from other ranks" in server.log.read_text()
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    assert f'remuda_loaded_weight_bytes{{model_name="remuda-tiny",rank="{victim}",' in metrics


def test_an_idle_gang_is_repaired_too(server: Served) -> None:
    before = pids(server)
    os.kill(before[0], signal.SIGKILL)
    deadline_s = time.monotonic() + REPAIR_TIMEOUT_S
    while pids(server)[0] == before[0]:
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.2)
    assert pids(server)[1] == before[1]
    wait_until_served(server)


def test_a_killed_leader_is_replaced_beside_living_ranks(server: Served, unfaulted: list[list[int]]) -> None:
    before = pids(server)
    leader = leader_of(processes_with(server.mark))
    assert_streams_outlive(leader.kill, server, unfaulted)
    assert pids(server) == before, "the ranks keep their processes"


@pytest.mark.full
def test_a_leader_that_takes_the_place_of_a_draining_one_drains_too(tmp_path: Path) -> None:
    with Served(("remuda-tiny", "--dtype", "float32"), tmp_path / "serve.log") as server:
        assert run_remuda("drain", "r0", "--target", server.target).returncode == 0
        leader = leader_of(processes_with(server.mark))
        leader.kill()
        deadline_s = time.monotonic() + REPAIR_TIMEOUT_S
        while "replica r0 has joined" not in server.log.read_text():
            assert time.monotonic() < deadline_s, server.log.read_text()
            time.sleep(0.2)
        assert leader_of(processes_with(server.mark)).pid != leader.pid
        assert server.status()["replicas"][0]["state"] == "draining"


@pytest.mark.full
def test_a_stopped_leader_is_replaced_beside_living_ranks(server: Served, unfaulted: list[list[int]]) -> None:
    """Nothing of it ends by itself: no process, and no connection."""
    before = pids(server)
    leader = leader_of(processes_with(server.mark))
    assert_streams_outlive(leader.suspend, server, unfaulted)
    assert pids(server) == before, "the ranks keep their processes"
    assert "the leader on" in server.log.read_text()
    leader.wait(30)
    assert server.process is not None and server.process.poll() is None


@pytest.mark.full
def test_a_rank_killed_while_it_starts_is_replaced_and_the_server_becomes_ready(tmp_path: Path) -> None:
    server = Served(("remuda-tiny", "--tp", "2"), tmp_path / "serve.log")
    server.start()
    try:
        deadline_s = time.monotonic() + REPAIR_TIMEOUT_S
        while not (starting := [each for each in processes_with(server.mark) if "remuda: rank 1" in each.cmdline()[0]]):
            assert time.monotonic() < deadline_s, server.log.read_text()
            time.sleep(0.05)
        starting[0].kill()
        server.wait_ready()
        assert starting[0].pid not in pids(server)
        wait_until_served(server)
    finally:
        server.stop()
    assert server.left_processes() == []
