"""One request of each kind that failover must know, and what it means that two answers are the same."""

from dataclasses import replace
from typing import Any

import pytest

from tests.failover.streams import Reading

NUM_TOKENS = 400
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string"}, "minItems": 40, "maxItems": 60}},
    "required": ["words"],
    "additionalProperties": False,
}
PROMPT = "Once upon a time there was a herd of horses"
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True},
    "seeded, penalties": {
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "seed": 7,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "ignore_eos": True,
    },
    "two choices": {
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "seed": 11,
        "n": 2,
        "ignore_eos": True,
    },
    "logprobs, echo": {
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.8,
        "seed": 5,
        "logprobs": 3,
        "echo": True,
        "ignore_eos": True,
    },
    "grammar": {
        "messages": [{"role": "user", "content": "List words."}],
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}},
    },
    "tools": {
        "messages": [{"role": "user", "content": "Call the tool."}],
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "seed": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}],
        "tool_choice": "required",
    },
}


def assert_same(found: Reading, whole: Reading) -> None:
    """All but how much of the prompt was cached. Log-probabilities within rounding: other requests run beside it."""
    assert (found.is_done, found.errors) == (True, [])
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [[usage[name] for name in counts] for usage in found.usage] == [[whole.usage[0][name] for name in counts]]
    assert found.choices.keys() == whole.choices.keys()
    for index, choice in found.choices.items():
        expected = whole.choices[index]
        assert replace(choice, logprobs=[]) == replace(expected, logprobs=[])
        assert len(choice.logprobs) == len(expected.logprobs)
        for one, other in zip(map(_flat, choice.logprobs), map(_flat, expected.logprobs), strict=True):
            assert one == [pytest.approx(value, abs=1e-3) if isinstance(value, float) else value for value in other]


def _flat(entry: Any) -> list[Any]:
    """A log-probability's values, however its form nests them."""
    if isinstance(entry, dict):
        entry = [part for pair in sorted(entry.items()) for part in pair]
    if isinstance(entry, list | tuple):
        return [value for part in entry for value in _flat(part)]
    return [entry]
