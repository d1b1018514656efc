"""``remuda serve --deterministic``: one client's answer, alone, beside others and under another step budget."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served import Served

PROMPT = [(7 * i * i + 3) % 400 for i in range(150)]
NUM_TOKENS = 16


def ask(server: Served, prompt: list[int], seed: int) -> Any:
    """Token ids, and log-probabilities to the last bit: JSON has doubles, written so that they are read the same."""
    body = {"model": "remuda-tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0.9, "seed": seed}
    options = {"logprobs": 3, "return_token_ids": True, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body | options, timeout=60)
    assert response.status_code == httpx.codes.OK, response.text
    choice = response.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]


def ask_beside(server: Served, num_others: int) -> Any:
    others = [[(i * j) % 300 + 1 for j in range(9 + 13 * i)] for i in range(num_others)]
    with ThreadPoolExecutor(num_others + 1) as pool:
        crowd = [pool.submit(ask, server, prompt, seed) for seed, prompt in enumerate(others[:4])]
        answer = pool.submit(ask, server, PROMPT, 5)
        crowd += [pool.submit(ask, server, prompt, seed) for seed, prompt in enumerate(others[4:])]
        for other in crowd:
            other.result()
        return answer.result()


@pytest.mark.full
def test_one_answer_however_it_is_served(tmp_path: Path) -> None:
    mode = ("remuda-tiny", "--device", "cpu", "--deterministic", "--no-enable-prefix-caching")
    with Served((*mode, "--max-num-batched-tokens", "512"), tmp_path / "log") as server:
        alone = ask(server, PROMPT, 5)
        assert len(alone[0]) == NUM_TOKENS
        assert ask_beside(server, 8) == alone
    with Served((*mode, "--max-num-batched-tokens", "64"), tmp_path / "log") as server:
        assert ask(server, PROMPT, 5) == alone
        assert ask_beside(server, 8) == alone
        (replica,) = server.status()["replicas"]
        assert replica["phase_seconds"]["self_test"] > 0
