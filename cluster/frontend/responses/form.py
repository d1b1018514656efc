"""A request's events as those of the Responses API.

``sequence_number`` counts what has been said, not how it was cut: an event counts 1, and a delta as many as it has
characters, of which its number is the last one's. So a number means the same place in every reading of a response, also
where another front end reads it from the leaders, and a client can go on behind any of them. Numbers grow by more than
one at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.errors import Cancelled, TakenOver, mapping_of
from cluster.frontend.calls import Delta, Echo, Event, Finished, Started, ToolCallDelta, Usage
from cluster.frontend.http_errors import error_object
from cluster.frontend.logprob_forms import chat_logprobs
from cluster.frontend.responses.response import response_object
from cluster.frontend.responses.schema import CreateBody
from cluster.frontend.sse import encode_json
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.whole_answer import stable_id, tool_call_id
from engine.request import FinishReason


class ResponseForm:
    """One reading of a response.

    Args:
        response_id: its name.
        body: what was asked.
        model: the served name.
        created_unix_s: for ``created_at``.
        table: names and bytes of tokens, for log-probabilities.
        starting_after: the reader had the events up to this number.
    """

    media_type = "text/event-stream"
    done = b""
    ping = b": ping\n\n"

    def __init__(
        self,
        response_id: str,
        body: CreateBody,
        model: str,
        created_unix_s: int,
        table: TokenBytes,
        starting_after: int = -1,
    ) -> None:
        self._id = response_id
        self._response = response_object(response_id, body, model, created_unix_s)
        self._table = table
        self._starting_after = starting_after
        self._next_number = 0
        self._output: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last item of the output is still being written."""
        self._logprobs: list[dict[str, Any]] = []
        """Of the text that is being written."""
        self._unsent_logprobs: list[dict[str, Any]] = []
        self._finished: Finished | None = None

    def chunk(self, chunk: dict[str, Any], event_id: str | None) -> bytes:
        return f"event: {chunk['type']}\ndata: ".encode() + encode_json(chunk) + b"\n\n"

    def error(self, error: BaseException) -> bytes:
        is_unread = not self._next_number and self._starting_after >= 0  # nothing of it could be read here (yet)
        if isinstance(error, TakenOver) or is_unread:
            return self.chunk(self._runs_on(error), None)
        self._next_number = max(self._next_number, self._starting_after + 1)
        return b"".join(self.chunk(chunk, None) for chunk in self._wanted(self._failed(error)))

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """What of this event the reader has not had."""
        yield from self._wanted(self._all(event))

    def response(self, events: Sequence[Event], error: BaseException | None = None) -> dict[str, Any]:
        """The response as it is after these events, and this error."""
        for event in events:
            for _ in self._all(event):
                pass
        if error is not None:
            for _ in self._failed(error):
                pass
        return self._response | {"output": self._output}

    def _wanted(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for chunk in chunks:
            num_new = chunk["sequence_number"] - self._starting_after
            if num_new <= 0:
                continue
            delta = chunk.get("delta")
            if delta is not None and num_new < len(delta):
                # Which of its tokens the reader had is not known; they come again with their log-probabilities.
                chunk["delta"] = delta[-num_new:]
            yield chunk

    def _event(self, kind: str, num_steps: int = 1, **fields: Any) -> dict[str, Any]:
        self._next_number += num_steps
        return {"type": kind, "sequence_number": self._next_number - 1, **fields}

    def _all(self, event: Event) -> Iterator[dict[str, Any]]:
        assert not isinstance(event, Echo), "a response echoes nothing"
        if isinstance(event, Started):
            yield self._event("response.created", response=dict(self._response))
            yield self._event("response.in_progress", response=dict(self._response))
        elif isinstance(event, Delta):
            yield from self._text(event)
            for call in event.tool_calls:
                yield from self._call(call)
        elif isinstance(event, Finished):
            self._finished = event
            if not self._output:
                yield from self._begin_message()
            yield from self._close("incomplete" if event.reason is FinishReason.LENGTH else "completed")
        else:
            yield from self._end(event)

    def _text(self, event: Delta) -> Iterator[dict[str, Any]]:
        if event.logprobs is not None:
            entries = chat_logprobs(self._table, event.token_ids, event.logprobs)
            self._logprobs += entries
            self._unsent_logprobs += entries
        if not event.text:
            return
        if not (self._is_open and self._output[-1]["type"] == "message"):
            yield from self._begin_message()
        self._part["text"] += event.text
        yield self._event(
            "response.output_text.delta",
            len(event.text),
            **self._place(content_index=0),
            delta=event.text,
            logprobs=self._unsent_logprobs,
        )
        self._unsent_logprobs = []

    def _call(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        if call.name is not None:
            item = {
                "type": "function_call",
                "call_id": tool_call_id(self._id, 0, call.index),
                "name": call.name,
                "arguments": "",
            }
            yield from self._begin("fc_", item)
        if call.arguments:
            self._output[-1]["arguments"] += call.arguments
            yield self._event(
                "response.function_call_arguments.delta", len(call.arguments), **self._place(), delta=call.arguments
            )

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        yield from self._begin("msg_", {"type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", **self._place(content_index=0), part=dict(part))
        self._output[-1]["content"] = [part]

    def _begin(self, prefix: str, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._is_open = True
        index = len(self._output)
        self._output.append({"id": prefix + stable_id(self._id, index), "status": "in_progress", **item})
        yield self._event("response.output_item.added", output_index=index, item=dict(self._output[-1]))

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            return
        item = self._output[-1]
        if item["type"] == "message":
            part, place = self._part, self._place(content_index=0)
            part["logprobs"], self._logprobs, self._unsent_logprobs = self._logprobs, [], []
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield self._event("response.content_part.done", **place, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done",
                **self._place(),
                name=item["name"],
                arguments=item["arguments"],
            )
        item["status"] = status
        self._is_open = False
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        assert self._finished is not None, "usage comes last"
        is_cut = self._finished.reason is FinishReason.LENGTH
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": _usage(usage),
            "output": self._output,
        }
        yield self._event(f"response.{self._response['status']}", response=self._response)

    def _runs_on(self, error: BaseException) -> dict[str, Any]:
        """No end of it: whoever asks again for what comes behind this number gets the rest."""
        told, number = error_object(error), max(self._next_number - 1, self._starting_after)
        return {
            "type": "error",
            "sequence_number": number,
            "code": told["code"],
            "message": told["message"],
            "param": None,
        }

    def _failed(self, error: BaseException) -> Iterator[dict[str, Any]]:
        """What was written stays; it is not complete."""
        if self._is_open:
            self._output[-1]["status"] = "incomplete"
        status = "cancelled" if isinstance(error, Cancelled) else "failed"
        self._response |= {
            "status": status,
            "output": self._output,
            "error": _error(error) if status == "failed" else None,
        }
        yield self._event(f"response.{status}", response=self._response)

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._output[-1]["content"][0]
        return part

    def _place(self, **more: int) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, **more}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def _error(error: BaseException) -> dict[str, Any]:
    """``code`` is one of those that OpenAI's clients know."""
    code = "rate_limit_exceeded" if mapping_of(error).http_status == 429 else "server_error"
    return {"code": code, "message": error_object(error)["message"]}
