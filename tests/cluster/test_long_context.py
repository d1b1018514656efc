"""A prompt of 131,000 token ids over HTTP: bodies, gRPC messages, plans and block tables of that length, all real."""

import time
from pathlib import Path

import httpx
import pytest

from tests.support.long_context import expected_tokens, make_checkpoint, make_prompt
from tests.support.served import Served

NUM_PROMPT, NUM_NEW = 131_000, 16


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_prompt_of_131000_tokens_is_served_and_found_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "long"
    prompt = make_prompt(NUM_PROMPT)
    expected = expected_tokens(make_checkpoint(checkpoint), prompt, NUM_NEW)
    body = {"model": "long", "prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "return_token_ids": True}
    arguments = (str(checkpoint), "--dtype", "float32", "--kv-cache-memory", "64MiB")
    with Served(arguments, tmp_path / "serve.log") as served, httpx.Client(timeout=120) as client:
        seconds = []
        for num_cached in (0, (NUM_PROMPT - 1) // 16 * 16):
            began_s = time.monotonic()
            answer = client.post(f"{served.url}/v1/completions", json=body | {"ignore_eos": True})
            seconds.append(time.monotonic() - began_s)
            assert answer.status_code == httpx.codes.OK, answer.text[:500]
            (choice,) = answer.json()["choices"]
            assert choice["token_ids"] == expected
            usage = answer.json()["usage"]
            assert usage["prompt_tokens"] == NUM_PROMPT
            assert (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) == num_cached
        assert seconds[1] < seconds[0] / 3
