"""Hub ids through the real ``huggingface_hub`` and a hub on this machine: pinned, resumed, once per host, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import COMMIT, HubServer

SCRIPT = """
import json, sys
from cluster.replica.model_source import resolve
from engine.errors import CheckpointError
try:
    source = resolve(sys.argv[1], sys.argv[2] or None)
    print(json.dumps({"revision": source.revision, "directory": str(source.directory())}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""
WEIGHTS = bytes(range(256)) * 4096
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "pytorch_model.bin": b"a pickle"}


def _environment(hub: HubServer, cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def _start(
    hub: HubServer, cache: Path, name: str = "team/pony", revision: str = "", **more: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, revision],
        env=_environment(hub, cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: "subprocess.Popen[str]") -> dict[str, str]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    answer: dict[str, str] = json.loads(output.splitlines()[-1])
    return answer


def test_a_branch_is_pinned_and_only_what_is_served_is_downloaded(tmp_path: Path) -> None:
    with HubServer(FILES) as hub:
        answer = _finish(_start(hub, tmp_path))
        assert answer["revision"] == COMMIT
        directory = Path(answer["directory"])
        assert (directory / "model.safetensors").read_bytes() == WEIGHTS
        assert not (directory / "pytorch_model.bin").exists()
        assert hub.ranges("pytorch_model.bin") == []
        content_requests = len(hub.ranges("model.safetensors"))
        # Offline, the same id is found without a single request.
        before = len(hub.requests)
        assert _finish(_start(hub, tmp_path, HF_HUB_OFFLINE="1")) == answer
        assert len(hub.requests) == before
        assert _finish(_start(hub, tmp_path)) == answer
        assert len(hub.ranges("model.safetensors")) == content_requests


def test_a_broken_download_is_resumed_where_it_broke(tmp_path: Path) -> None:
    # The library writes what it gets in chunks of 10 MiB.
    large = WEIGHTS * 16
    with HubServer({**FILES, "model.safetensors": large}, break_after={"model.safetensors": 12 * 2**20}) as hub:
        answer = _finish(_start(hub, tmp_path))
        while "error" in answer:
            answer = _finish(_start(hub, tmp_path))
        assert (Path(answer["directory"]) / "model.safetensors").read_bytes() == large
        ranges = hub.ranges("model.safetensors")
        assert ranges == ["", f"bytes={10 * 2**20}-"]


def test_processes_of_one_host_download_once(tmp_path: Path) -> None:
    with HubServer(FILES) as hub:
        answers = [_finish(process) for process in [_start(hub, tmp_path) for _ in range(3)]]
        assert answers[0] == answers[1] == answers[2]
        assert len(hub.ranges("model.safetensors")) == 1


def test_what_the_hub_does_not_have_is_named(tmp_path: Path) -> None:
    with HubServer(FILES) as hub:
        assert "team/horse" in _finish(_start(hub, tmp_path, "team/horse"))["error"]
        assert "no revision v9" in _finish(_start(hub, tmp_path, revision="v9"))["error"]
    # Now nobody answers: what is in no cache cannot be had.
    assert "cannot be reached" in _finish(_start(hub, tmp_path))["error"]
