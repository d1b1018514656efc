"""A gang whose ranks die again and again: repairs end, requests end once with the reason, and so does the server."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from cluster.replica.recovery import MAX_REPAIRS
from tests.support.served import Served

REPAIRED_WITHIN_S = 60.0


def _pid(server: Served, rank: int) -> int:
    pid: int = server.status()["replicas"][0]["ranks"][rank]["pid"]
    return pid


@pytest.mark.full
@pytest.mark.timeout(500)
def test_a_rank_that_dies_again_and_again_ends_the_server(tmp_path: Path) -> None:
    with Served(("remuda-tiny", "--tp", "2"), tmp_path / "serve.log") as server:
        lines: list[str] = []
        begun = threading.Event()

        def stream() -> None:
            body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 1900, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        lines.append(line.removeprefix("data: "))
                        begun.set()

        reader = threading.Thread(target=stream)
        reader.start()
        assert begun.wait(30)
        victim = _pid(server, 1)
        for repair in range(MAX_REPAIRS + 1):
            os.kill(victim, signal.SIGKILL)
            if repair == MAX_REPAIRS:
                break
            deadline_s = time.monotonic() + REPAIRED_WITHIN_S
            while (present := _pid(server, 1)) == victim:
                assert time.monotonic() < deadline_s, server.log.read_text()
                time.sleep(0.1)
            victim = present
        reader.join(60)
        assert not reader.is_alive()
        assert server.process is not None
        assert server.process.wait(60) == 1
    assert lines[-1] == "[DONE]"
    errors = [chunk["error"] for chunk in map(json.loads, lines[:-1]) if "error" in chunk]
    assert len(errors) <= 1, "a stream ends once; it may have had all its tokens before the last repair"
    assert f"{MAX_REPAIRS} repairs" in server.log.read_text()
    assert server.left_processes() == []
