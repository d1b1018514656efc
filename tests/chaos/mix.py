"""The requests that run while something breaks: one of each kind, streamed, and some that ask for the whole answer."""

import uuid
from typing import Any

from tests.failover.requests import REQUESTS

WHOLE = ("greedy", "two choices", "tools")
"""Kinds that are also asked for without a stream."""
NUM_TOKENS = 120
LONG_PROMPT_WORDS = 200
NUM_TOKENS_AFTER_LONG_PROMPT = 40


def short_prompts(num_tokens: int = NUM_TOKENS) -> dict[str, dict[str, Any]]:
    """Name → body of each request. They decode for seconds. No prefix of theirs is cached from an earlier call."""
    streamed = {name: {**body, "max_tokens": num_tokens} for name, body in REQUESTS.items()}
    whole = {f"{name}, at once": {**streamed[name], "stream": False} for name in WHOLE}
    return _salted(streamed | whole)


def long_prompts() -> dict[str, dict[str, Any]]:
    """The same kinds behind prompts that take seconds to prefill."""
    found = short_prompts()
    for number, body in enumerate(found.values()):
        body["max_tokens"] = NUM_TOKENS_AFTER_LONG_PROMPT
        text = " ".join(f"{(index * 7 + number) % 10}" for index in range(LONG_PROMPT_WORDS))
        if "messages" in body:
            body["messages"] = [{"role": "user", "content": text}, *body["messages"]]
        else:
            body |= {"prompt": text, "echo": False}
    return found


def _salted(bodies: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    salt = uuid.uuid4().hex
    return {name: {**body, "cache_salt": salt} for name, body in bodies.items()}
