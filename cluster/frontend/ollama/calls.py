"""Ollama's requests as calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.frontend.calls import Call, ChatPrompt, Prompt, TextPrompt
from cluster.frontend.embedding import embedding_call
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.ollama.schema import ChatBody, GenerateBody, Message
from cluster.frontend.thinking import thinking_variables
from cluster.frontend.tools.request import offered_tools, past_calls
from engine.errors import InvalidRequest


def generate_call(body: GenerateBody, model: str, request_id: str) -> Call:
    """Raises InvalidRequest."""
    body.refuse(
        images="images are not served",
        template="the template is the checkpoint's own",
        context="token ids of an earlier answer are not taken; use /api/chat",
    )
    return Call(
        request_id=request_id,
        prompts=[_generate_prompt(body)],
        model=model,
        options=body.sampling(),
        stop=body.stops,
    )


def _generate_prompt(body: GenerateBody) -> Prompt:
    if body.suffix:
        return TextPrompt(body.prompt, suffix=body.suffix)
    if body.raw:
        # Who writes the template's text writes its control tokens too.
        return TextPrompt(body.prompt, parse_special_tokens=True)
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt}]
    return ChatPrompt(messages, variables=thinking_variables(body.think))


def embed_call(
    texts: Sequence[str], dimensions: int | None, truncates: bool, model: str, files: ModelFiles, request_id: str
) -> Call:
    """Raises InvalidRequest."""
    if not all(texts):
        raise InvalidRequest("an input must not be empty", "input")
    inputs = [TextPrompt(text) for text in texts]
    return embedding_call(request_id, inputs, dimensions, files, model=model, truncates=truncates)


def chat_call(body: ChatBody, model: str, request_id: str) -> Call:
    """Raises InvalidRequest."""
    tools = offered_tools([{"type": "function", **tool} for tool in body.tools or ()], None)
    if body.structured() is not None and tools:
        raise InvalidRequest("format and tools cannot both shape the answer; leave one out", "format")
    messages = [_message(message, f"messages.{position}") for position, message in enumerate(body.messages)]
    return Call(
        request_id=request_id,
        prompts=[ChatPrompt(messages, variables=thinking_variables(body.think), tools=tools)],
        model=model,
        options=body.sampling(),
        stop=body.stops,
        tools=[tool["function"]["name"] for tool in tools],
    )


def _message(message: Message, param: str) -> Mapping[str, Any]:
    if message.images:
        raise InvalidRequest("images are not served; send text only", f"{param}.images")
    shown: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        shown["tool_calls"] = past_calls(message.tool_calls, f"{param}.tool_calls")
    if message.thinking:
        shown["reasoning_content"] = message.thinking
    if message.tool_name:
        shown["name"] = message.tool_name
    return shown
