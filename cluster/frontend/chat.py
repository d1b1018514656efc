"""/v1/chat/completions: the request as a call, its events as OpenAI's JSON, whole or in chunks."""

from collections.abc import Iterator
from typing import Any

from cluster.frontend.calls import Call, Delta, Echo, Event, Finished, Started, ToolCallDelta, Usage
from cluster.frontend.completions import usage_object
from cluster.frontend.logprob_forms import chat_logprobs
from cluster.frontend.openai_schema import ChatBody
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.whole_answer import tool_call_id
from engine.request import FinishReason


def chat_call(body: ChatBody, request_id: str) -> Call:
    """Raises InvalidRequest."""
    body.refuse_what_is_not_served()
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = body.chat_prompt()
    return Call(
        request_id=request_id,
        prompts=[prompt],
        model=body.model,
        options=body.options(max_tokens, body.num_logprobs(), None),
        n=1 if body.n is None else body.n,
        stop=body.stops,
        limits=body.limits,
        tools=[tool["function"]["name"] for tool in prompt.tools],
        one_tool_call=body.parallel_tool_calls is False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


class ChatForm:
    """One request's answer.

    Args:
        call: what was asked.
        body: how it is to be shown.
        model: the served name.
        created_unix_s: for ``created``.
        table: names and bytes of tokens, for log-probabilities.
    """

    def __init__(self, call: Call, body: ChatBody, model: str, created_unix_s: int, table: TokenBytes) -> None:
        self._head = {"id": call.request_id, "object": "", "created": created_unix_s, "model": model}
        self._call = call
        self._n = call.n
        self._with_ids = bool(body.return_token_ids)
        self._includes_usage = body.includes_usage
        self._table = table

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The stream's form: each choice's role, text and finish reason; then the usage where it was asked for."""
        assert not isinstance(event, Echo), "a chat echoes nothing"
        if isinstance(event, Started):
            for index in range(self._n):
                chunk = self._chunk(index, {"role": "assistant", "content": ""})
                if self._with_ids and index == 0:
                    chunk["prompt_token_ids"] = list(event.prompt_token_ids[0])
                yield chunk
        elif isinstance(event, Usage):
            if self._includes_usage:
                yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_object(event)}
        elif isinstance(event, Finished):
            yield self._chunk(event.choice, {}, finish_reason=_finish_reason(event), stop_reason=_stop_reason(event))
        else:
            if event.text or event.logprobs or (self._with_ids and event.token_ids):
                more: dict[str, Any] = {"token_ids": list(event.token_ids)} if self._with_ids else {}
                yield self._chunk(event.choice, {"content": event.text}, logprobs=self._logprobs(event), **more)
            for call in event.tool_calls:
                yield self._chunk(event.choice, {"tool_calls": [self._call_delta(event.choice, call)]})

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._includes_usage:
            chunk["usage"] = None
        return chunk

    def _call_delta(self, choice: int, call: ToolCallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": self._call_id(choice, call.index), "type": "function", "function": function}

    def _call_id(self, choice: int, index: int) -> str:
        return tool_call_id(self._call.request_id, choice, index)

    def _logprobs(self, event: Delta) -> dict[str, Any] | None:
        if event.logprobs is None:
            return None
        return {"content": chat_logprobs(self._table, event.token_ids, event.logprobs), "refusal": None}

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """All of a request's events as one object."""
        answer: dict[str, Any] = {**self._head, "object": "chat.completion"}
        choices = [self._whole_choice(index, events) for index in range(self._n)]
        for event in events:
            if isinstance(event, Started) and self._with_ids:
                answer["prompt_token_ids"] = list(event.prompt_token_ids[0])
            elif isinstance(event, Usage):
                answer["usage"] = usage_object(event)
        return {**answer, "choices": choices}

    def _whole_choice(self, index: int, events: list[Event]) -> dict[str, Any]:
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == index]
        end = next(event for event in events if isinstance(event, Finished) and event.choice == index)
        tokens = [entry for delta in deltas if (part := self._logprobs(delta)) for entry in part["content"]]
        has_logprobs = any(delta.logprobs is not None for delta in deltas)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(delta.text for delta in deltas),
            "refusal": None,
        }
        if calls := self._whole_calls(index, deltas):
            message.update(content=message["content"] or None, tool_calls=calls)
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": tokens, "refusal": None} if has_logprobs else None,
            "finish_reason": _finish_reason(end),
            "stop_reason": _stop_reason(end),
        }
        if self._with_ids:
            choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return choice

    def _whole_calls(self, choice: int, deltas: list[Delta]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        for call in (call for delta in deltas for call in delta.tool_calls):
            if call.name is not None:
                function = {"name": call.name, "arguments": ""}
                calls.append({"id": self._call_id(choice, call.index), "type": "function", "function": function})
            calls[call.index]["function"]["arguments"] += call.arguments
        return calls


def _finish_reason(end: Finished) -> str:
    """``tool_calls`` only where every call can be carried out."""
    return "tool_calls" if end.calls_tools and end.reason is FinishReason.STOP else end.reason.value


def _stop_reason(end: Finished) -> str | int | None:
    """vLLM's addition: the stop string or the end token that it was."""
    return end.stop_string if end.stop_string is not None else end.stop_token_id
