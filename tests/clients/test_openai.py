"""OpenAI's own client: chats, completions, responses, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.clients.chores import MODEL, PLACE, TOOL, USER, check_place


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    http = httpx.Client(timeout=60, trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as made:
        yield made


def test_chats(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None and whole.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole.choices[0].message.content
    # Whether the first of the two finds its prompt in the cache is up to the tests before.
    told = chunks[-1].usage
    assert told is not None and told.completion_tokens == whole.usage.completion_tokens
    assert told.prompt_tokens == whole.usage.prompt_tokens and told.total_tokens == whole.usage.total_tokens


def test_completions(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert text == whole.text and whole.logprobs is not None and len(whole.logprobs.tokens or ()) == 8


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64 and decodes it, unless it is told otherwise."""
    texts = ["Once upon a time", "there was a herd"]
    coded = client.embeddings.create(model=MODEL, input=texts)
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for one, other in zip(coded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-4)
    assert coded.usage == plain.usage and coded.usage.prompt_tokens == coded.usage.total_tokens > 4
    (few,) = client.embeddings.create(model=MODEL, input=[5, 6, 7], dimensions=16).data
    assert len(few.embedding) == 16
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="a", dimensions=100_000)
    assert caught.value.param == "dimensions"


def test_a_schema_is_kept_to(client: openai.OpenAI) -> None:
    class Place(BaseModel):
        side: Literal["left", "right"]
        far: bool

    wish: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=USER, response_format=wish, temperature=0)
    check_place(json.loads(answer.choices[0].message.content or ""))
    parsed = client.responses.parse(model=MODEL, input="Where?", text_format=Place, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Place)


def test_tools(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "tools": [TOOL], "tool_choice": "required", "temperature": 0}
    message = client.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls or ()
    check_place(json.loads(call.function.arguments))  # type: ignore[union-attr]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [each.function.arguments for each in streamed or ()] == [call.function.arguments]  # type: ignore[union-attr]
    turns = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "here"}]
    assert client.chat.completions.create(model=MODEL, messages=turns, max_tokens=4).choices[0].finish_reason


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "Once upon a time", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    response_id, numbers = events[0].response.id, [event.sequence_number for event in events]  # type: ignore[union-attr]
    for number in numbers[:-1]:
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=number))
        assert rest[-1].response.output_text == whole.output_text  # type: ignore[union-attr]
        assert rest[0].sequence_number > number
    more = client.responses.create(model=MODEL, input="And?", previous_response_id=response_id, max_output_tokens=4)
    assert more.previous_response_id == response_id and more.usage and whole.usage
    assert more.usage.input_tokens > whole.usage.input_tokens
    client.responses.delete(response_id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response_id)


def test_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.chat.completions.create(model="other", messages=USER)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context length") as refused:
        client.completions.create(model=MODEL, prompt="x", max_tokens=10**6)
    assert refused.value.code == "context_length_exceeded"
