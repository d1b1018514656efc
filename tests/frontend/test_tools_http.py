"""Tool calling over the API: OpenAI's own client, streams against whole answers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.calls import Call, ChatPrompt, Delta, Event
from cluster.frontend.chat import ChatForm
from cluster.frontend.choice import Choice
from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.model_files import read_model_files
from cluster.frontend.openai_schema import ChatBody
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.tokenizer import Tokenizer
from cluster.frontend.tools.grammar import TOKENS
from cluster.frontend.tools.parser import ToolCallParser
from engine.request import FinishReason
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import USER, chat, events_of
from tests.frontend.scripted import ScriptedBackend, replica_info, says
from tests.frontend.servers import served
from tests.frontend.test_choice import outputs_of
from tests.frontend.test_templates import CALLED, SOURCES, TOOLS, for_template
from tests.frontend.test_tool_parser import FRAGMENTS

WEATHER = {"name": "get_weather", "parameters": {"city": "Köln 🙂", "days": [1, 2]}}
TWO_CALLS = f"<|python_tag|>{json.dumps(WEATHER, ensure_ascii=False)}; " + json.dumps(WEATHER | {"parameters": {}})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("tools") / "m", SOURCES["llama31"])


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(read_model_files(path))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As a model writes it, its control tokens included."""
    return tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)


def end_of(tokenizer: Tokenizer, name: str = "<|eot_id|>") -> int:
    return ids_of(tokenizer, name)[0]


def saying(ids: list[int], end: int | None = None) -> ScriptedBackend:
    """A model with room for the tools."""
    backend = ScriptedBackend(says(ids, stop_token_id=end))
    backend.infos = [replica_info(max_model_len=4096)]
    return backend


def calls_of(chunks: list[Any]) -> list[dict[str, str]]:
    """A stream's tool calls, put together by index as clients do it."""
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", []) if chunk["choices"] else []:
            if call["index"] == len(calls):
                assert call["type"] == "function"
                calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return calls


async def test_calls_with_the_openai_client(path: Path, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, TWO_CALLS)
    assert end_of(tokenizer, "<|python_tag|>") in ids
    async with served(saying(ids, end_of(tokenizer)), model_path=path) as one:
        answer = await one.openai.chat.completions.create(model="m", messages=USER, tools=TOOLS)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        calls = choice.message.tool_calls
        assert [(call.type, call.function.name) for call in calls] == [("function", "get_weather")] * 2
        assert json.loads(calls[0].function.arguments) == WEATHER["parameters"]
        assert calls[1].function.arguments == "{}"
        assert len({call.id for call in calls}) == 2
        assert answer.usage.completion_tokens == len(ids) + 1
        prompt = tokenizer.decode(one.backend.requests[0].token_ids, with_special=True)
        assert json.dumps(TOOLS[0], indent=4, ensure_ascii=False) in prompt

        # What comes back can be sent back.
        history = [*USER, choice.message.model_dump()]
        history += [{"role": "tool", "tool_call_id": call.id, "content": "21"} for call in calls[:1]]
        history[-2]["tool_calls"] = history[-2]["tool_calls"][:1]
        await one.openai.chat.completions.create(model="m", messages=history, tools=TOOLS)
        prompt = tokenizer.decode(one.backend.requests[1].token_ids, with_special=True)
        assert '{"name": "get_weather", "parameters": {"city": "Köln 🙂", "days": [1, 2]}}<|eot_id|>' in prompt
        assert 'ipython<|end_header_id|>\n\n"21"<|eot_id|>' in prompt


async def test_a_streamed_call_chunk_by_chunk(path: Path, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, TWO_CALLS)
    async with served(saying(ids, end_of(tokenizer)), model_path=path) as one:
        body = chat(tools=TOOLS, stream=True, stream_options={"include_usage": True}, messages=CALLED[:1])
        chunks = events_of((await one.http.post("/v1/chat/completions", json=body)).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any(delta.get("content") for delta in deltas)
        named = [delta["tool_calls"][0] for delta in deltas if "id" in delta.get("tool_calls", [{}])[0]]
        assert [(call["index"], call["function"]) for call in named] == [
            (0, {"name": "get_weather", "arguments": ""}),
            (1, {"name": "get_weather", "arguments": ""}),
        ]
        # Argument by argument and inside strings, not all at once.
        assert sum("tool_calls" in delta for delta in deltas) > 6
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[-1]["usage"]["completion_tokens"] == len(ids) + 1
        calls = calls_of(chunks)
        assert json.loads(calls[0]["arguments"]) == WEATHER["parameters"]
        whole = (await one.http.post("/v1/chat/completions", json=chat(tools=TOOLS, messages=CALLED[:1]))).json()
        functions = [call["function"] for call in whole["choices"][0]["message"]["tool_calls"]]
        assert functions == [{"name": call["name"], "arguments": call["arguments"]} for call in calls]


async def test_one_call_only_stops_the_work(path: Path, tokenizer: Tokenizer) -> None:
    text = json.dumps(WEATHER)
    ids = ids_of(tokenizer, f"{text};{text};{text}")
    async with served(saying(ids * 3), model_path=path) as one:
        body = chat(tools=TOOLS, parallel_tool_calls=False)
        answer = (await one.http.post("/v1/chat/completions", json=body)).json()
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["message"]["tool_calls"]) == 1
        # The token that ends the call is the last that counts, and the engine was told to stop.
        assert answer["usage"]["completion_tokens"] <= len(ids_of(tokenizer, f"{text};"))
        assert len(one.backend.aborted) == 1


async def test_what_is_no_call_is_content(path: Path, tokenizer: Tokenizer) -> None:
    for text in ('{"name": "rm", "parameters": {}}', "<|python_tag|>print(1)", "[1] is a footnote"):
        async with served(saying(ids_of(tokenizer, text), end_of(tokenizer)), model_path=path) as one:
            body = chat(tools=TOOLS)
            choice = (await one.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
            assert choice["finish_reason"] == "stop"
            chunks = events_of((await one.http.post("/v1/chat/completions", json={**body, "stream": True})).text)
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


async def test_a_call_that_breaks_off_is_not_announced(path: Path, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, json.dumps(WEATHER))
    async with served(saying(ids, end_of(tokenizer)), model_path=path) as one:
        body = chat(tools=TOOLS, max_tokens=len(ids) - 4)
        choice = (await one.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert json.dumps(WEATHER["parameters"]).startswith(arguments)


async def test_without_tools_or_with_none_nothing_is_parsed(path: Path, tokenizer: Tokenizer) -> None:
    text = json.dumps(WEATHER)
    async with served(says(ids_of(tokenizer, f"<|python_tag|>{text}")), model_path=path) as one:
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}):
            answer = (await one.http.post("/v1/chat/completions", json=chat(**more))).json()
            assert answer["choices"][0]["message"]["content"] == text
            assert "get_weather" not in tokenizer.decode(one.backend.requests[-1].token_ids)


CALL = {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f"}}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "auto, none, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": "f"}}, "tool_choice", "auto, none, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "tools"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "tools"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": TOOLS * 2}, "tools.1.function.name", "differ"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "letters"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
        "tools.0.function.parameters",
        "",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools.0.function.strict", "strict"),
    ({"tools": "f"}, "tools", ""),
    ({"functions": [{"name": "f"}]}, "functions", "tools"),
    ({"function_call": "auto"}, "function_call", "tool_choice"),
    ({"messages": [{"role": "function", "name": "f", "content": "1"}]}, "messages.0", "tool_calls"),
    ({"messages": [*USER, {**CALL, "tool_calls": 1}]}, "messages.1.tool_calls", "list"),
    ({"messages": [*USER, {**CALL, "tool_calls": [{}]}]}, "messages.1.tool_calls.0", "function"),
    *(
        (
            {"messages": [*USER, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]},
            "messages.1.tool_calls.0.function.arguments",
            "JSON object",
        )
        for arguments in ("{", "[]", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 100 + "1" + "}" * 100, 5)
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0",
        "images",
    ),
]


async def test_what_is_not_served_is_refused_by_name(path: Path) -> None:
    async with served(says([300]), model_path=path) as one:
        for body, param, words in REFUSED:
            response = await one.http.post("/v1/chat/completions", json=chat(**body))
            assert response.status_code == 400, (body, response.text)
            error = response.json()["error"]
            assert error["param"] == param, (body, error)
            assert words in error["message"]
    async with served(says([300])) as one:  # remuda-tiny's template has no place for tools
        response = await one.http.post("/v1/chat/completions", json=chat(tools=TOOLS))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_tokenize_shows_the_prompt_with_tools(path: Path, tokenizer: Tokenizer) -> None:
    async with served(says([300]), model_path=path) as one:
        answer = (await one.http.post("/tokenize", json={"messages": CALLED, "tools": TOOLS})).json()
        assert answer["tokens"] == tokenizer.encode_chat(for_template(CALLED), tools=TOOLS)


def through_the_form(choice: Choice, outputs: list[Any], takes: list[bool]) -> list[Event]:
    events: list[Event] = []
    for output in outputs:
        choice.feed(output)
        if choice.finished is not None or not takes or takes.pop(0):
            events += [delta for delta in [choice.take_delta()] if delta is not None]
        if choice.finished is not None:
            break
    assert choice.finished is not None
    return [*events, choice.finished]


@given(data=st.data())
def test_a_stream_put_together_is_the_whole_answer(tokenizer: Tokenizer, data: st.DataObject) -> None:
    calls = st.sampled_from(['{"name": "f", "parameters": {"a": "é🙂"}}', "[f(a=1)]"])
    text = "".join(data.draw(st.lists(FRAGMENTS | calls, max_size=8)))
    ids = ids_of(tokenizer, text)
    end = data.draw(st.sampled_from([None, end_of(tokenizer)]))
    stops = data.draw(st.sampled_from([[], ["text"], ["}"]]))
    shown = tokenizer.control_tokens(TOKENS)

    def run(sizes: list[int], takes: list[bool]) -> tuple[list[Any], dict[str, Any], list[Event]]:
        detokenizer = Detokenizer(tokenizer.bytes, (), shown)
        choice = Choice(0, detokenizer, StopStrings(stops), wants_logprobs=True, tools=ToolCallParser(["f"]))
        events = through_the_form(choice, outputs_of(ids, sizes, end), takes)
        call = Call("r", [ChatPrompt(USER)], tools=["f"])
        form = ChatForm(call, ChatBody.model_validate({"messages": USER}), "m", 0, tokenizer.bytes)
        return [chunk for event in events for chunk in form.chunks(event)], form.whole(events), events

    chunks, _, events = run(data.draw(st.lists(st.integers(0, 4), max_size=12)), data.draw(st.lists(st.booleans())))
    _, whole, whole_events = run([len(ids) + 1], [])
    message = whole["choices"][0]["message"]
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert content == (message["content"] or "")
    whole_calls = [
        {"id": c["id"], "name": c["function"]["name"], "arguments": c["function"]["arguments"]}
        for c in message.get("tool_calls", [])
    ]
    assert calls_of(chunks) == whole_calls
    finish_reason = chunks[-1]["choices"][0]["finish_reason"]
    assert finish_reason == whole["choices"][0]["finish_reason"]
    assert (finish_reason == "tool_calls") <= (bool(whole_calls) and (end is not None or bool(stops)))
    # Every token once, with its log-probability, in both.
    for list_of_events in (events, whole_events):
        deltas = [event for event in list_of_events if isinstance(event, Delta)]
        tokens = [token_id for delta in deltas for token_id in delta.token_ids]
        assert tokens == [*ids, *([end] if end is not None else [])][: len(tokens)]
        assert [entry.logprob for delta in deltas for entry in delta.logprobs or ()] == [-id_ for id_ in tokens]
    if not stops:
        assert (finish_reason == "length") == (end is None)
        assert whole_events[-1].reason is (FinishReason.LENGTH if end is None else FinishReason.STOP)
