"""Groq's client, whose paths begin with /openai/v1."""

import json
from collections.abc import Iterator
from typing import Any

import groq
import httpx
import pytest

from tests.clients.chores import MODEL, TOOL, USER, check_place


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[groq.Groq]:
    http = httpx.Client(timeout=60, trust_env=False)
    with groq.Groq(base_url=url, api_key="none", max_retries=0, http_client=http) as made:
        yield made


def test_chats(client: groq.Groq) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole.choices[0].message.content


def test_tools_and_errors(client: groq.Groq) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[TOOL], tool_choice="required", temperature=0
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    check_place(json.loads(call.function.arguments))
    with pytest.raises(groq.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=USER)
