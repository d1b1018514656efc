"""Anthropic's requests as calls: their blocks as the messages that chat templates know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.frontend.anthropic.schema import CountBody, Message, MessagesBody, Tool, ToolChoice
from cluster.frontend.calls import Call, ChatPrompt, SamplingOptions, StructuredOutput
from cluster.frontend.structured import forced_call, json_schema_output
from cluster.frontend.thinking import thinking_variables
from cluster.frontend.tools.request import is_forced, offered_tools, past_calls
from engine.errors import InvalidRequest

_THOUGHTS = ("thinking", "redacted_thinking")


def messages_call(body: MessagesBody, request_id: str) -> Call:
    """Raises InvalidRequest."""
    prompt = chat_prompt(body)
    return Call(
        request_id=request_id,
        prompts=[prompt],
        model=body.model,
        options=SamplingOptions(
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            structured=_structured(body, prompt.tools),
        ),
        stop=body.stop_sequences or (),
        tools=[tool["function"]["name"] for tool in prompt.tools],
        one_tool_call=body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use,
    )


def chat_prompt(body: CountBody) -> ChatPrompt:
    """What the model reads. Raises InvalidRequest."""
    body.refuse_what_is_not_served()
    if not body.messages:
        raise InvalidRequest("messages must not be empty", "messages")
    if body.messages[-1].role == "assistant":
        raise InvalidRequest(
            "this server does not continue an answer that was begun; end with a message of the user", "messages"
        )
    messages = list(_messages(body.messages))
    if body.system:
        messages.insert(0, {"role": "system", "content": _text_of(body.system, "system")})
    thinking = None if body.thinking is None else body.thinking.type != "disabled"
    tools = offered_tools([_tool(tool, index) for index, tool in enumerate(body.tools or ())], _choice(body))
    return ChatPrompt(messages, variables=thinking_variables(thinking), tools=tools)


def _structured(body: CountBody, tools: Sequence[Mapping[str, Any]]) -> StructuredOutput | None:
    asked = None if body.output_config is None else body.output_config.format
    if asked is not None and tools:
        raise InvalidRequest("output_config.format and tools cannot both shape the answer", "output_config.format")
    if is_forced(_choice(body)):
        return forced_call(tools)
    return None if asked is None else json_schema_output(asked.json_schema, "output_config.format.schema")


def _choice(body: CountBody) -> str | dict[str, Any] | None:
    """As OpenAI's clients write it."""
    choice: ToolChoice | None = body.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _tool(tool: Tool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(f"tools of the type {tool.type!r} are not served; name your own", f"tools.{index}.type")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _messages(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    names: dict[str, str] = {}
    """Of the tools that were called, by the call's id."""
    for position, message in enumerate(messages):
        where = f"messages.{position}.content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content, where, names)
        else:
            yield from _user(message.role, message.content, where, names)


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str, names: dict[str, str]) -> dict[str, Any]:
    calls = [block for block in blocks if block.get("type") == "tool_use"]
    thoughts = [block["thinking"] for block in blocks if isinstance(block.get("thinking"), str)]
    rest = [block for block in blocks if block.get("type") not in ("tool_use", *_THOUGHTS)]
    message: dict[str, Any] = {"role": "assistant", "content": _text_of(rest, where)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        as_written = [
            {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input")}}
            for block in calls
        ]
        message["tool_calls"] = past_calls(as_written, where)
        names.update((str(block.get("id")), block["name"]) for block in calls)
    return message


def _user(
    role: str, blocks: Sequence[Mapping[str, Any]], where: str, names: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """The results of tools as messages of their own, then the text."""
    rest = []
    for number, block in enumerate(blocks):
        if block.get("type") != "tool_result":
            rest.append(block)
            continue
        call_id = str(block.get("tool_use_id"))
        content = _text_of(block.get("content") or "", f"{where}.{number}.content")
        yield {"role": "tool", "tool_call_id": call_id, "name": names.get(call_id, ""), "content": content}
    if rest or not blocks:
        yield {"role": role, "content": _text_of(rest, where)}


def _text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("content must be a string or a list of blocks", where)
    texts = []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequest(f"blocks of the type {kind!r} are not served; send text", f"{where}.{number}")
        texts.append(block["text"])
    return "\n".join(texts)
