"""Anthropic's own client."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest

from tests.clients.chores import MODEL, PLACE, USER, check_place

TOOLS: Any = [{"name": "find", "description": "Find it", "input_schema": PLACE}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    http = httpx2.Client(timeout=60, trust_env=False)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=http) as made:
        yield made


def test_messages(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 12, "messages": USER, "extra_body": {"temperature": 0}}
    whole: Any = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text and text == whole.content[0].text
    assert (final.usage.output_tokens, final.stop_reason) == (whole.usage.output_tokens, whole.stop_reason)
    count = client.messages.count_tokens(model=MODEL, messages=USER)
    assert count.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_tools(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 400, "messages": USER, "tools": TOOLS, "tool_choice": {"type": "any"}}
    asked["extra_body"] = {"temperature": 0}
    answer: Any = client.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (block,) = answer.content
    check_place(block.input)
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[0].input == block.input  # type: ignore[union-attr]
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "here"}
    turns: Any = [*USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model=MODEL, max_tokens=4, messages=turns, tools=TOOLS).stop_reason


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", max_tokens=4, messages=USER)
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        client.messages.create(model=MODEL, max_tokens=10**6, messages=USER, timeout=60)
