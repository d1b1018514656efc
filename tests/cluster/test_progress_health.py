"""A served gang one of whose ranks is stopped: who is named, where it is seen, and what is left to look at."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import msgspec
import pytest

from engine.messages import StepPlan, StepResult
from engine.packed import unpack
from tests.support.served import Served, run_remuda

pytestmark = pytest.mark.timeout(180)
NUM_SMOKE_REQUESTS = 2
"""Of the self-test: nothing was recorded of remuda-tiny in this layout."""
BODY = {"model": "remuda-tiny", "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


def complete(served: Served, num_tokens: int) -> list[int]:
    body = BODY | {"max_tokens": num_tokens, "return_token_ids": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def sampled_tokens(record: Path) -> tuple[dict[str, int], list[int]]:
    """Kinds of lines, and what the sampling rank has sampled for slot 0, in order."""
    kinds: dict[str, int] = {}
    tokens: list[int] = []
    for line in map(json.loads, record.read_text().splitlines()):
        kinds[line["kind"]] = kinds.get(line["kind"], 0) + 1
        if line["kind"] == "plan":
            assert msgspec.convert(line["message"], StepPlan).epoch == 0
        elif line["kind"] == "answer" and line["rank"] == 0:
            tokens += unpack(msgspec.convert(line["message"], StepResult).token_ids)
    return kinds, tokens


@pytest.mark.full
def test_a_stopped_rank_is_named_replaced_and_recorded(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Served(("remuda-tiny", "--tp", "2"), tmp_path / "log") as served:
        expected = complete(served, 12)
        record = tmp_path / "record.jsonl"
        assert run_remuda("status", "--target", served.target, "--dump", str(record)).returncode == 0
        kinds, tokens = sampled_tokens(record)
        assert kinds["head"] == kinds["epoch"] == 1 and kinds["answer"] == 2 * kinds["plan"]
        assert kinds["request"] == NUM_SMOKE_REQUESTS + 1
        assert tokens[-len(expected) :] == expected
        assert record.stat().st_mode & 0o777 == 0o600
        replayed = run_remuda("replay", str(record))
        assert replayed.returncode == 0 and "replay exactly" in replayed.stdout, replayed.stdout + replayed.stderr

        ranks = served.status()["replicas"][0]["ranks"]
        assert [rank["state"] for rank in ranks] == ["idle", "idle"]
        answers: list[list[int]] = []
        reader = threading.Thread(target=lambda: answers.append(complete(served, 1500)))
        reader.start()
        while (
            'remuda_num_requests_running{model_name="remuda-tiny"} 1.0' not in httpx.get(f"{served.url}/metrics").text
        ):
            assert reader.is_alive()
        os.kill(ranks[1]["pid"], signal.SIGSTOP)
        stopped_at = time.monotonic()
        # With its operation and its host, which status names with its address behind it.
        address = ranks[1]["host"].partition("(")[2].rstrip(")")
        named = re.compile(
            rf"rank 1 does not go on in step \d+, .*its process is stopped.* \(rank 1 on {re.escape(address)}\)"
        )
        while not named.search(served.log.read_text()):
            assert time.monotonic() - stopped_at < 10
            assert httpx.get(f"{served.url}/livez", timeout=5).status_code == 200
            time.sleep(0.05)
        print(f"named {time.monotonic() - stopped_at:.2f} s after SIGSTOP")
        reader.join(90)
        assert [len(answer) for answer in answers] == [1500], "the request went on"
        kept = list((tmp_path / "state" / "remuda").glob("r0-*.jsonl"))
        assert len(kept) == 1 and '"is_final":true' in kept[0].read_text()
        assert run_remuda("status", "--target", served.target, "--dump", str(record)).returncode == 0
    for file in (kept[0], record):
        replayed = run_remuda("replay", str(file))
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "in 2 epochs" in replayed.stdout
