"""The tool fields of a chat request: what may be called, and what was called in the conversation so far."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cluster.frontend.tools.cursor import MAX_DEPTH
from engine.errors import InvalidRequest

MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def offered_tools(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The tools that the model is shown and may call, as the client wrote them; none where it said so.

    Raises:
        InvalidRequest: a tool that is no function, a name that is bad or stands twice, a choice that is not served.
    """
    checked = [_check_tool(tool, number, is_forced(tool_choice)) for number, tool in enumerate(tools or ())]
    if len(checked) > MAX_TOOLS:
        raise InvalidRequest(f"tools may hold at most {MAX_TOOLS} tools, not {len(checked)}", "tools")
    seen: set[str] = set()
    for number, tool in enumerate(checked):
        name = tool["function"]["name"]
        if name in seen:
            raise InvalidRequest(
                f"two tools bear the name {name!r}; names must differ", f"tools.{number}.function.name"
            )
        seen.add(name)
    return _chosen(checked, tool_choice)


def is_forced(tool_choice: str | Mapping[str, Any] | None) -> bool:
    """Whether the answer must be a call. Of a choice that ``offered_tools`` has found good."""
    return tool_choice not in (None, "auto", "none")


def _chosen(tools: list[dict[str, Any]], tool_choice: str | Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if tool_choice in (None, "auto", "none"):
        return tools if tool_choice != "none" else []
    if not tools:
        raise InvalidRequest("tool_choice asks for a tool, but there are no tools", "tool_choice")
    if tool_choice == "required":
        return tools
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise InvalidRequest(
            'tool_choice must be auto, none, required or {"type": "function", "function": {"name": …}}, '
            f"not {tool_choice!r}",
            "tool_choice",
        )
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise InvalidRequest(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    return named


def _check_tool(tool: Mapping[str, Any], number: int, is_forced: bool) -> dict[str, Any]:
    param = f"tools.{number}"
    if tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise InvalidRequest('a tool must be {"type": "function", "function": {"name": …}}', param)
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"a function's name must be 1 to 64 letters, digits, dots, hyphens or underscores, not {name!r}",
            f"{param}.function.name",
        )
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise InvalidRequest("a function's parameters must be a JSON schema object", f"{param}.function.parameters")
    if function.get("strict") and not is_forced:
        raise InvalidRequest(
            "strict arguments are served where a call is forced; set tool_choice to required, or leave strict out",
            f"{param}.function.strict",
        )
    return dict(tool)


def _is_shallow(value: Any, num_levels: int) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return all(num_levels > 1 and _is_shallow(entry, num_levels - 1) for entry in inside)


def past_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    """A message's ``tool_calls`` for a template, which expects the arguments as a mapping. Raises InvalidRequest."""
    if not isinstance(calls, list):
        raise InvalidRequest("tool_calls must be a list", param)
    return [_past_call(call, f"{param}.{number}") for number, call in enumerate(calls)]


def _past_call(call: Any, param: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            'a tool call must be {"id": …, "type": "function", "function": {"name", "arguments"}}', param
        )
    given = function.get("arguments")
    arguments: Any = {} if given in (None, "") else given
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping) or not _is_shallow(arguments, MAX_DEPTH):
        raise InvalidRequest(
            f"the arguments of a tool call must be a JSON object, at most {MAX_DEPTH} deep",
            f"{param}.function.arguments",
        )
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
