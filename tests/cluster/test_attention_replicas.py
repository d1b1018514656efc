"""A gang of two attention replicas that share their experts, through the real command."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.served import Served

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
