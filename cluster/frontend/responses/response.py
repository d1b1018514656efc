"""The response object: what was asked, and room for what came of it. Pure."""

from typing import Any

from cluster.frontend.responses.schema import CreateBody


def response_object(response_id: str, body: CreateBody, model: str, created_unix_s: int) -> dict[str, Any]:
    """As it is when the response begins."""
    text_format = None if body.text is None else body.text.format
    shown_format = {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_unix_s,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "store": body.is_stored,
        "temperature": body.temperature,
        "text": {"format": shown_format},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
