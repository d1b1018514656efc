"""A request's events as Anthropic's: a message whose content is blocks of text and of tool calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from cluster.errors import mapping_of
from cluster.frontend.anthropic.errors import anthropic_error
from cluster.frontend.calls import Call, Delta, Echo, Event, Finished, Started, Usage
from cluster.frontend.http_errors import error_object
from cluster.frontend.sse import encode_json
from cluster.frontend.whole_answer import tool_call_id
from engine.request import FinishReason


class NamedEvents:
    """Server-sent events that bear their type as a name."""

    media_type = "text/event-stream"
    done = b""
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def chunk(self, chunk: dict[str, Any], event_id: str | None) -> bytes:
        return f"event: {chunk['type']}\ndata: ".encode() + encode_json(chunk) + b"\n\n"

    def error(self, error: BaseException) -> bytes:
        return self.chunk(anthropic_error(mapping_of(error).http_status, error_object(error)), None)


class AnthropicForm:
    """One request's answer.

    Args:
        call: what was asked.
        model: the served name.
    """

    def __init__(self, call: Call, model: str) -> None:
        self._call_id = call.request_id
        self._model = model
        self._num_blocks = 0
        self._open: str | None = None
        """The type of the block that is being written."""
        self._num_calls = 0
        self._finished: Finished | None = None

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The stream's form."""
        assert not isinstance(event, Echo), "a message echoes nothing"
        if isinstance(event, Started):
            num_prompt_tokens = sum(map(len, event.prompt_token_ids))
            yield {"type": "message_start", "message": self._message([], _usage(Usage(num_prompt_tokens, 0, 0)))}
        elif isinstance(event, Delta):
            yield from self._delta(event)
        elif isinstance(event, Finished):
            self._finished = event
            yield from self._close()
        else:
            assert self._finished is not None, "usage comes last"
            end = {"stop_reason": _stop_reason(self._finished), "stop_sequence": self._finished.stop_string}
            yield {"type": "message_delta", "delta": end, "usage": _usage(event)}
            yield {"type": "message_stop"}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The message that the stream would have built."""
        message: dict[str, Any] = {}
        blocks: list[dict[str, Any]] = []
        arguments: dict[int, str] = {}
        for chunk in (chunk for event in events for chunk in self.chunks(event)):
            kind, delta = chunk["type"], chunk.get("delta", {})
            if kind == "message_start":
                message = chunk["message"]
            elif kind == "content_block_start":
                blocks.append(dict(chunk["content_block"]))
            elif kind == "content_block_delta" and delta["type"] == "text_delta":
                blocks[-1]["text"] += delta["text"]
            elif kind == "content_block_delta":
                arguments[len(blocks) - 1] = arguments.get(len(blocks) - 1, "") + delta["partial_json"]
            elif kind == "message_delta":
                message |= delta | {"usage": chunk["usage"]}
        for index, written in arguments.items():
            blocks[index]["input"] = _object_of(written)
        return message | {"content": blocks}

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._call_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _delta(self, event: Delta) -> Iterator[dict[str, Any]]:
        if event.text:
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._add({"type": "text_delta", "text": event.text})
        for call in event.tool_calls:
            if call.name is not None:
                call_id = tool_call_id(self._call_id, event.choice, call.index)
                yield from self._begin({"type": "tool_use", "id": call_id, "name": call.name, "input": {}})
            if call.arguments:
                yield self._add({"type": "input_json_delta", "partial_json": call.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open = block["type"]
        self._num_blocks += 1
        yield {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}

    def _add(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._num_blocks - 1}


def _object_of(written: str) -> dict[str, Any]:
    """A call that broke off has no input that could be used."""
    try:
        return msgspec.json.decode(written, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }


def _stop_reason(end: Finished) -> str:
    if end.stop_string is not None:
        return "stop_sequence"
    if end.reason is FinishReason.LENGTH:
        return "max_tokens"
    return "tool_use" if end.calls_tools else "end_turn"
