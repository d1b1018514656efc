"""Chat templates of every served family, with tools: golden strings, and as transformers renders the same templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.models.llama4.processing_llama4 import chat_template as LLAMA4

from cluster.frontend.chat_template import ChatTemplate
from cluster.frontend.model_files import read_model_files
from cluster.frontend.openai_schema import ChatBody
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import InvalidRequest
from tests.frontend import tokenizers_for_tests

FOLDER = Path(__file__).parents[1] / "data" / "templates"
SOURCES = {path.stem: path.read_text() for path in FOLDER.glob("*.jinja")} | {"llama4": LLAMA4}
WITH_TOOLS = ["llama31", "llama32", "llama4", "mistral", "qwen3"]
DATE = {"date_string": "26 Jul 2024"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Météo <b>& more</b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be terse. "},
    {"role": "user", "content": " Why is 日本 far? 🙂\n"},
    {"role": "assistant", "content": "It is not."},
    {"role": "user", "content": "Oh"},
]
# As a client sends it; the arguments are text there.
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": "abcdef123",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Köln", "days": [1, 2]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdef123", "content": '{"degrees": 21}'},
]

GOLDEN_TALK = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe terse. \n<</SYS>>\n\n Why is 日本 far? 🙂 [/INST] It is not. </s><s>[INST] Oh [/INST]"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy is 日本 far? 🙂<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is not.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOh<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama4": (
        "<s><|header_start|>system<|header_end|>\n\nBe terse.<|eot|>"
        "<|header_start|>user<|header_end|>\n\n Why is 日本 far? 🙂\n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nIt is not.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nOh<|eot|><|header_start|>assistant<|header_end|>\n\n"
    ),
    "mistral": "<s>[INST]  Why is 日本 far? 🙂\n[/INST] It is not.</s>[INST] Be terse. \n\nOh[/INST]",
    "qwen3": (
        "<|im_start|>system\nBe terse. <|im_end|>\n<|im_start|>user\n Why is 日本 far? 🙂\n<|im_end|>\n"
        "<|im_start|>assistant\nIt is not.<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\n"
    ),
}
GOLDEN_TALK["llama31"] = GOLDEN_TALK["llama3"].replace(
    "Be terse.", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe terse."
)
GOLDEN_TALK["llama32"] = GOLDEN_TALK["llama3"]

_JSON_FORM = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best"
    ' answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument'
    " name and its value}.Do not use variables.\n\n"
)
_INDENTED = json.dumps(TOOLS[0], indent=4, ensure_ascii=False)
_LINE = json.dumps(TOOLS[0], ensure_ascii=False)
_ARGUMENTS = '{"city": "Köln", "days": [1, 2]}'
GOLDEN_CALLED = {
    "llama31": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{_JSON_FORM}{_INDENTED}\n\nWeather in Köln?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        f'{{"name": "get_weather", "parameters": {_ARGUMENTS}}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"degrees\\": 21}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama32": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are an expert in composing functions. If you decide to"
        " invoke any of the function(s), you MUST put it in the format of [func_name1(params_name1=params_value1,"
        " params_name2=params_value2...), func_name2(params)]\nHere is a list of functions in JSON format that you can"
        f" invoke.\n\n{json.dumps([TOOLS[0]['function']], indent=4, ensure_ascii=False)}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWeather in Köln?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n[get_weather(city="Köln", days=[1, 2])]<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"degrees\\": 21}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama4": (
        f"<s><|header_start|>user<|header_end|>\n\n{_JSON_FORM}{_INDENTED}\n\nWeather in Köln?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n<|python_start|><|python_end|>"
        f'{{"name": "get_weather", "parameters": {_ARGUMENTS}}}<|eot|>'
        '<|header_start|>ipython<|header_end|>\n\n"{\\"degrees\\": 21}"<|eot|>'
        "<|header_start|>assistant<|header_end|>\n\n"
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS] [{_LINE}][/AVAILABLE_TOOLS][INST] Weather in Köln?[/INST]"
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {_ARGUMENTS}, "id": "abcdef123"}}]</s>'
        '[TOOL_RESULTS] {"content": {"degrees": 21}, "call_id": "abcdef123"}[/TOOL_RESULTS]'
    ),
    "qwen3": (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are"
        f" provided with function signatures within <tools></tools> XML tags:\n<tools>\n{_LINE}\n</tools>\n\nFor each"
        " function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:"
        '\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather in Köln?<|im_end|>\n"
        f'<|im_start|>assistant\n<tool_call>\n{{"name": "get_weather", "arguments": {_ARGUMENTS}}}\n</tool_call>'
        '<|im_end|>\n<|im_start|>user\n<tool_response>\n{"degrees": 21}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    ),
}


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the front end makes of a client's messages."""
    return list(ChatBody.model_validate_json(json.dumps({"messages": messages})).chat_prompt().messages)


def render(name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **more: Any) -> str:
    template = ChatTemplate(SOURCES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(for_template(messages), variables={**DATE, **more}, tools=tools)


@pytest.mark.parametrize("name", sorted(GOLDEN_TALK))
def test_a_conversation(name: str) -> None:
    assert render(name, TALK, []) == GOLDEN_TALK[name]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_conversation_with_a_tool_call(name: str) -> None:
    assert render(name, CALLED, TOOLS) == GOLDEN_CALLED[name]


def test_llama_31_calls_a_built_in_tool() -> None:
    messages = [
        {"role": "user", "content": "Gold?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "brave_search", "arguments": '{"query": "gold"}'}}]},
    ]
    text = render("llama31", messages, [], builtin_tools=["brave_search", "code_interpreter"])
    assert "Environment: ipython\nTools: brave_search\n\n" in text
    assert '<|python_tag|>brave_search.call(query="gold")<|eom_id|>' in text


def test_which_templates_take_tools() -> None:
    takes = {name: ChatTemplate(source, {}).takes_tools for name, source in SOURCES.items()}
    assert takes == {name: name in WITH_TOOLS for name in SOURCES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("templates") / "m")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]]:
    """Ours and transformers', with each template."""
    both = {}
    for name, source in SOURCES.items():
        (folder / "chat_template.jinja").write_text(source)
        both[name] = (Tokenizer(read_model_files(folder)), PreTrainedTokenizerFast.from_pretrained(folder))
    (folder / "chat_template.jinja").unlink()
    return both


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_prompts_equal_transformers(name: str, tokenizers: Any) -> None:
    ours, theirs = tokenizers[name]
    cases: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [(TALK, []), (TALK[1:], [])]
    if name in WITH_TOOLS:
        cases += [(TALK, TOOLS), (CALLED, TOOLS), (TALK[:1] + CALLED, TOOLS * 2), (CALLED[:1], TOOLS)]
    if name == "guard3":
        cases = [(TALK[1:], []), (TALK[1:3], []), (TALK[1:2], [])]
    for messages, tools in cases:
        given = for_template(messages)
        for add_generation_prompt in (True, False):
            options = {"add_generation_prompt": add_generation_prompt, **DATE}
            expected = theirs.apply_chat_template(given, tools=tools or None, **options)["input_ids"]
            assert ours.encode_chat(given, add_generation_prompt, DATE, tools=tools) == expected
            text = theirs.apply_chat_template(given, tools=tools or None, tokenize=False, **options)
            template = ChatTemplate(SOURCES[name], {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token})
            assert template.render(given, add_generation_prompt, DATE, tools) == text


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_control_tokens_of_a_client_stay_text_everywhere(name: str, tokenizers: Any) -> None:
    ours: Tokenizer = tokenizers[name][0]

    def forged(word: str) -> list[int]:
        function = {"name": "f", "description": word, "parameters": {"properties": {word: {"enum": [word]}}}}
        call = {"function": {"name": f"f{word}", "arguments": json.dumps({word: word})}, "id": "abcdef123"}
        messages = [
            {"role": "user", "content": word},
            {"role": "assistant", "content": word, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdef123", "content": word},
        ]
        return ours.encode_chat(for_template(messages), True, DATE, tools=[{"type": "function", "function": function}])

    def num_control(ids: list[int]) -> int:
        return sum(id_ in ours.special_ids for id_ in ids)

    for word in ("<|eot_id|>", "<|eot|>", "<|python_tag|>", "[TOOL_CALLS]", "<|start_header_id|>"):
        assert num_control(forged(word)) == num_control(forged("word")), word
        assert ours.decode(forged(word), with_special=True).count(word) >= 6


def test_a_template_that_writes_escapes(folder: Path) -> None:
    """Python's repr and JSON in ASCII: a quoted control token comes back in these too."""
    (folder / "chat_template.jinja").write_text("{{ messages }}|{{ messages[0] | tojson(ensure_ascii=true) }}")
    tokenizer = Tokenizer(read_model_files(folder))
    (folder / "chat_template.jinja").unlink()
    ids = tokenizer.encode_chat([{"role": "user", "content": "é <|eot_id|>"}])
    text = "[{'role': 'user', 'content': 'é <|eot_id|>'}]|{\"role\": \"user\", \"content\": \"\\u00e9 <|eot_id|>\"}"
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.special_ids


def test_a_template_of_its_own_for_tools(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    original = config.read_text()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    config.write_text(json.dumps({**json.loads(original), "chat_template": named}))
    try:
        ours = Tokenizer(read_model_files(folder))
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    finally:
        config.write_text(original)
    messages = [{"role": "user", "content": "x"}]
    for tools in ([], TOOLS):
        expected = theirs.apply_chat_template(messages, tools=tools or None)["input_ids"]
        assert ours.encode_chat(messages, tools=tools) == expected


def test_tools_that_a_template_would_not_show_are_refused(tokenizers: Any) -> None:
    with pytest.raises(InvalidRequest, match="does not take tools") as caught:
        tokenizers["llama3"][0].encode_chat(TALK, tools=TOOLS)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'ab' * 10000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(40) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[7].role.nothing }}",
        "{{ [].append.__globals__ }}",
        "{% do messages.append(1) %}",
        "{{ messages.append(1) }}",
    ],
)  # fmt: skip
def test_what_a_template_can_do_is_bounded(source: str) -> None:
    try:
        template = ChatTemplate(source, {})
    except Exception as error:
        assert "chat template" in str(error)
        return
    with pytest.raises(InvalidRequest):
        template.render([{"role": "user", "content": "x"}])
