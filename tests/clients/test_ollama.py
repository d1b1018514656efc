"""Ollama's own client."""

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.clients.chores import MODEL, PLACE, TOOL, USER, check_place

OPTIONS = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[ollama.Client]:
    made = ollama.Client(host=url, timeout=60, trust_env=False)
    yield made
    made._client.close()


def test_chats_and_texts(client: ollama.Client) -> None:
    whole = client.chat(MODEL, USER, options=OPTIONS)
    parts = list(client.chat(MODEL, USER, options=OPTIONS, stream=True))
    text = "".join(part.message.content or "" for part in parts)
    assert text and text == whole.message.content and parts[-1].eval_count == whole.eval_count
    raw = client.generate(MODEL, "Once upon", raw=True, options=OPTIONS)
    lines = client.generate(MODEL, "Once upon", raw=True, options=OPTIONS, stream=True)
    assert "".join(line.response for line in lines) == raw.response != ""


def test_embeddings(client: ollama.Client) -> None:
    both = client.embed(MODEL, ["Once upon", "a time"])
    assert len(both.embeddings) == 2 and both.prompt_eval_count and both.model == MODEL
    assert client.embed(MODEL, "Once upon").embeddings[0] == pytest.approx(list(both.embeddings[0]), abs=1e-5)
    assert len(client.embed(MODEL, "Once upon", dimensions=8).embeddings[0]) == 8
    assert client.embeddings(MODEL, "a time").embedding == pytest.approx(list(both.embeddings[1]), abs=1e-5)


def test_a_schema_is_kept_to(client: ollama.Client) -> None:
    answer = client.chat(MODEL, USER, format=PLACE, options={"temperature": 0})
    check_place(json.loads(answer.message.content or ""))


def test_tools_are_shown_to_the_model(client: ollama.Client) -> None:
    """Ollama has no way to force a call, and a tiny model makes none by itself: see tests/frontend for calls."""
    plain = client.chat(MODEL, USER, options=OPTIONS)
    shown = client.chat(MODEL, USER, tools=[TOOL], options=OPTIONS)
    assert (shown.prompt_eval_count or 0) > (plain.prompt_eval_count or 0)


def test_models_and_errors(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [MODEL]
    assert [model.model for model in client.ps().models] == [MODEL]
    assert "tools" in (client.show(MODEL).capabilities or ())
    with pytest.raises(ollama.ResponseError, match="does not exist") as caught:
        client.chat("other", USER)
    assert caught.value.status_code == 404
    asked: Any = client.pull
    with pytest.raises(ollama.ResponseError, match="pull is not served"):
        asked("llama3.2")
