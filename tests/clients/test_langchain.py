"""LangChain's ChatOpenAI, over chats and over responses."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.chores import MODEL, PLACE, TOOL, check_place

QUESTION = "Once upon a time"


Make = Callable[..., ChatOpenAI]


@pytest.fixture
def model_of(url: str) -> Iterator[Make]:
    with httpx.Client(timeout=60, trust_env=False) as http:

        def make(**more: Any) -> ChatOpenAI:
            values: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 400, "max_retries": 0, **more}
            return ChatOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, **values)

        yield make


@pytest.mark.parametrize("over_responses", [False, True])
def test_answers_streams_and_tools(model_of: Make, over_responses: bool) -> None:
    model = model_of(use_responses_api=over_responses)
    whole = model.invoke(QUESTION, max_tokens=12)
    chunks = list(model.stream(QUESTION, max_tokens=12))
    assert whole.text and "".join(chunk.text for chunk in chunks) == whole.text
    forced = model.bind_tools([TOOL], tool_choice="required")
    answer: Any = forced.invoke(QUESTION)
    (call,) = answer.tool_calls
    assert call["name"] == "find"
    check_place(call["args"])
    turns = [HumanMessage(QUESTION), answer, ToolMessage("here", tool_call_id=call["id"])]
    assert model.invoke(turns, max_tokens=4).usage_metadata is not None


def test_schemas_and_errors(model_of: Make) -> None:
    structured = model_of().with_structured_output({"title": "place", **PLACE}, method="json_schema")
    check_place(structured.invoke(QUESTION))
    with pytest.raises(openai.NotFoundError):
        model_of(model="other").invoke(QUESTION)


def test_embeddings(url: str) -> None:
    with httpx.Client(timeout=60, trust_env=False) as http:
        values: dict[str, Any] = {"model": MODEL, "api_key": "none", "max_retries": 0, "http_client": http}
        # Else it sends tokens of a vocabulary that it thinks it knows.
        made = OpenAIEmbeddings(base_url=f"{url}/v1", check_embedding_ctx_length=False, **values)
        first, second = made.embed_documents(["Once upon", "a time"])
        assert made.embed_query("Once upon") == pytest.approx(first, abs=1e-5) and first != second
