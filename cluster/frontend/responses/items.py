"""Items of the Responses API ↔ the messages that chat templates know."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.frontend.tools.request import past_calls
from cluster.frontend.whole_answer import WholeAnswer, tool_call_id
from engine.errors import InvalidRequest

_TEXTS = ("input_text", "output_text", "text", "refusal")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def input_items(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the client wrote, as items."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", **item} for item in given]


def messages_of(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raises InvalidRequest for what is not served: media, and tools that a server would carry out."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    """Of the functions that were called, by the call's id."""
    for position, item in enumerate(items):
        where = f"input.{position}"
        kind = item.get("type")
        if kind == "message":
            messages.append({"role": _role(item, where), "content": _text_of(item.get("content"), f"{where}.content")})
        elif kind == "function_call":
            _add_call(messages, names, item, where)
        elif kind == "function_call_output":
            call_id = str(item.get("call_id"))
            content = _text_of(item.get("output"), f"{where}.output")
            messages.append(
                {"role": "tool", "tool_call_id": call_id, "name": names.get(call_id, ""), "content": content}
            )
        elif kind != "reasoning":
            raise InvalidRequest(f"items of the type {kind!r} are not served", f"{where}.type")
    return messages


def answer_message(answer: WholeAnswer, response_id: str) -> dict[str, Any]:
    """What the model said, for the next turn. A call that broke off is not shown to it again."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    calls = [
        {
            "id": tool_call_id(response_id, 0, index),
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }
        for index, call in enumerate(answer.tool_calls)
        if (arguments := call.as_object()) is not None
    ]
    return {**message, "tool_calls": calls} if calls else message


def _role(item: Mapping[str, Any], where: str) -> str:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(_ROLES)}, not {role!r}", f"{where}.role")
    return _ROLES[role]


def _add_call(messages: list[dict[str, Any]], names: dict[str, str], item: Mapping[str, Any], where: str) -> None:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    calls = past_calls([{"id": item.get("call_id"), "function": function}], where)
    names[str(item.get("call_id"))] = calls[0]["function"]["name"]
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).extend(calls)


def _text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("it must be a string or a list of parts", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise InvalidRequest(f"parts of the type {kind!r} are not served; send text", f"{where}.{number}")
        texts.append(text)
    return "\n".join(texts)
