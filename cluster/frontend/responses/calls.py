"""Requests of the Responses API as calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.frontend.calls import Call, ChatPrompt, SamplingOptions, StructuredOutput
from cluster.frontend.responses.schema import CreateBody
from cluster.frontend.structured import forced_call
from cluster.frontend.thinking import thinking_variables
from cluster.frontend.tools.request import is_forced, offered_tools
from engine.errors import InvalidRequest


def response_call(body: CreateBody, messages: Sequence[Mapping[str, Any]], response_id: str) -> Call:
    """Args:
        body: what is asked.
        messages: the conversation, this request's input included, without its instructions.
        response_id: the new response's.

    Raises:
        InvalidRequest: something that is not served, or not what it should be.
    """
    body.refuse_what_is_not_served()
    if not messages:
        raise InvalidRequest("input must not be empty", "input")
    choice = _choice(body.tool_choice)
    tools = offered_tools([_tool(tool, index) for index, tool in enumerate(body.tools or ())], choice)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    effort = None if body.reasoning is None else body.reasoning.effort
    thinking = thinking_variables(False if effort == "none" else effort)
    return Call(
        request_id=response_id,
        prompts=[ChatPrompt([*instructions, *messages], variables=thinking, tools=tools)],
        model=body.model,
        options=SamplingOptions(
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            logprobs=body.num_logprobs(),
            structured=_structured(body, choice, tools),
        ),
        tools=[tool["function"]["name"] for tool in tools],
        one_tool_call=body.parallel_tool_calls is False,
    )


def _structured(
    body: CreateBody, choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]
) -> StructuredOutput | None:
    asked = body.structured()
    if asked is not None and tools:
        raise InvalidRequest(
            "text.format and tools cannot both shape the answer; leave one out, or set tool_choice to none", asked.param
        )
    return forced_call(tools) if is_forced(choice) else asked


def _choice(choice: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """As chats have it."""
    if isinstance(choice, Mapping) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """As chats have it."""
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"tools of the type {tool.get('type')!r} are not served; only functions are", f"tools.{index}.type"
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
