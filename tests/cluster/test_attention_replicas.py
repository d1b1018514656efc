"""A gang of two attention replicas that share their experts, through the real command."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.served import Served, run_remuda

pytestmark = [pytest.mark.timeout(180), pytest.mark.full]

PROMPTS = ["Once upon a time", "My name is Zora. What is my name?", "The sun", "One, two, three,", "In the beginning"]


def complete(server: Served, prompt: str) -> str:
    body = {"model": "remuda-tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_two_groups_answer_as_one(tmp_path: Path) -> None:
    """In float32, so that the answers of two layouts can be compared: one after the other, while one group is idle, and
    all at once."""
    texts = []
    for name, layout in (("one", ("--tp", "2", "--ep", "2")), ("two", ("--dp", "2", "--ep", "2"))):
        with Served(("remuda-tiny", *layout, "--dtype", "float32"), tmp_path / f"{name}.log") as server:
            alone = [complete(server, prompt) for prompt in PROMPTS]
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                together = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))
            (replica,) = server.status()["replicas"]
            assert [rank["rank"] for rank in replica["ranks"]] == [0, 1]
            assert together == alone
            texts.append(alone)
    assert texts[0] == texts[1]


def test_a_new_rank_takes_from_its_sibling_all_but_its_experts(tmp_path: Path) -> None:
    arguments = ("remuda-tiny", "--dp", "2", "--ep", "2", "--dtype", "float32")
    with Served(arguments, tmp_path / "serve.log") as server:
        expected = [complete(server, prompt) for prompt in PROMPTS]
        before = server.status()["replicas"][0]["ranks"]
        assert all(rank["weight_bytes_from_peers"] == 0 < rank["weight_bytes_from_disk"] for rank in before)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            running = pool.map(lambda prompt: complete(server, prompt), PROMPTS)
            os.kill(before[1]["pid"], signal.SIGKILL)
            assert list(running) == expected
        after = server.status()["replicas"][0]["ranks"]
        assert after[0] == before[0] | {key: after[0][key] for key in ("state", "step", "operation", "since_s")}
        read = after[1]["weight_bytes_from_disk"], after[1]["weight_bytes_from_peers"]
        assert after[1]["pid"] != before[1]["pid"] and min(read) > 0
        assert sum(read) == before[1]["weight_bytes_from_disk"]
        text = f"of the new ranks' weights {read[1]:,} bytes came from other ranks, {read[0]:,} from the checkpoint"
        assert text in server.log.read_text()
        shown = run_remuda("status", "--target", server.target).stdout
        assert f"loaded {read[1]:,} bytes from other ranks, {read[0]:,} from disk" in shown
        assert [complete(server, prompt) for prompt in PROMPTS] == expected
