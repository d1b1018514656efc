"""Ranks that die while they serve: requests end once with an error, other replicas go on, nothing is left behind."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served import Served


def _complete(server: Served, **more: Any) -> httpx.Response:
    body = {"model": "remuda-tiny", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def _kill_rank(server: Served, replica: int, rank: int) -> None:
    os.kill(server.status()["replicas"][replica]["ranks"][rank]["pid"], signal.SIGKILL)


@pytest.mark.timeout(180)
def test_a_lost_rank_ends_its_requests_and_a_single_gang_ends_the_server(tmp_path: Path) -> None:
    with Served(("remuda-tiny", "--tp", "2"), tmp_path / "serve.log") as server:
        lines: list[str] = []
        begun = threading.Event()

        def stream() -> None:
            body = {"model": "remuda-tiny", "prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        lines.append(line.removeprefix("data: "))
                        begun.set()

        reader = threading.Thread(target=stream)
        reader.start()
        assert begun.wait(30)
        _kill_rank(server, 0, 1)
        reader.join(30)
        assert not reader.is_alive()
        assert lines[-1] == "[DONE]"
        errors = [chunk["error"] for chunk in map(json.loads, lines[:-1]) if "error" in chunk]
        assert len(errors) == 1
        assert json.loads(lines[-2]) == {"error": errors[0]}
        assert "rank 1" in errors[0]["message"]
        assert server.process is not None
        assert server.process.wait(60) == 1
    assert "rank 1" in server.log.read_text()
    assert server.left_processes() == []
