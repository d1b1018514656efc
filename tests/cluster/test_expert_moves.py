"""Experts that move while the real command serves through Ray: the answers stay, and ``remuda status`` tells of it."""

import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.replica.model_source import resolve
from tests.support.served import Served, run_remuda
from tests.support.zipf_model import make_zipf_model, prompt_for, zipf_loads

pytestmark = [pytest.mark.timeout(180), pytest.mark.full]

NUM_PROMPTS, PROMPT_LENGTH, NUM_NEW = 12, 160, 6
TINY_VOCAB_SIZE = 2048
LAYOUT = ("--dp", "2", "--ep", "2", "--dtype", "float32")
MOVE_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that nobody needs: prompts are numbers."""
    directory = tmp_path_factory.mktemp("zipf")
    make_zipf_model(directory, vocab_size=TINY_VOCAB_SIZE, width=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("remuda-tiny", None).directory() / name, directory)
    return directory


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The first experts have most to do, and all of them are on one rank."""
    rng = random.Random(3)
    return [prompt_for(zipf_loads(), PROMPT_LENGTH, rng) for _ in range(NUM_PROMPTS)]


def answers(server: Served, prompts: list[list[int]], salt: str) -> list[list[int]]:
    """All at once; no prompt is in the cache."""

    def complete(prompt: list[int]) -> list[int]:
        body = {
            "model": "zipf",
            "prompt": prompt,
            "max_tokens": NUM_NEW,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return token_ids

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(complete, prompts))


def experts_of(server: Served) -> dict[str, Any]:
    (replica,) = server.status()["replicas"]
    experts: dict[str, Any] = replica["experts"]
    return experts


def work_until(server: Served, prompts: list[list[int]], is_done: Callable[[], bool]) -> list[list[list[int]]]:
    """What was answered meanwhile."""
    found: list[list[list[int]]] = []
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S
    while not is_done():
        assert time.monotonic() < deadline_s, server.log.read_text()
        found.append(answers(server, prompts, f"round-{len(found)}"))
    return found


def test_experts_move_and_answers_do_not_change(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    command = (str(model), "--served-model-name", "zipf", *LAYOUT)
    with Served(command, tmp_path / "fixed.log") as server:
        expected = answers(server, prompts, "fixed")
        fixed = experts_of(server)
        assert fixed["num_moves"] == 0 and fixed["imbalance"] > 1.3
    balanced = ("--enable-eplb", "--num-redundant-experts", "2")
    with Served((*command, *balanced), tmp_path / "moving.log") as server:
        assert answers(server, prompts, "before") == expected
        before = experts_of(server)
        meanwhile = work_until(server, prompts, lambda: experts_of(server)["num_moves"] > 0)
        assert meanwhile == [expected] * len(meanwhile)
        assert answers(server, prompts, "after") == expected
        after = experts_of(server)
        assert after["num_failed_moves"] == 0 and after["num_moved_experts"] > 0
        pairs = [now - then for now, then in zip(after["rank_pairs"], before["rank_pairs"], strict=True)]
        assert all(count > 0 for count in pairs)
        told = run_remuda("status", "--target", server.target).stdout
        assert f"{after['num_moved_experts']} experts read" in told
