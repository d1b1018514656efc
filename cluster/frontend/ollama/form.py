"""A request's events as Ollama's objects: a line each, or one for all."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from cluster.frontend.calls import Delta, Echo, Event, Finished, Usage
from cluster.frontend.http_errors import error_object
from cluster.frontend.logprob_forms import chat_logprobs
from cluster.frontend.ollama.errors import ollama_error
from cluster.frontend.sse import encode_json
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.whole_answer import WholeCall, put_together
from engine.request import FinishReason


class Lines:
    """One JSON object a line. Ollama's clients read every line, so nothing keeps an idle stream busy."""

    media_type = "application/x-ndjson"
    done = b""
    ping = b""

    def chunk(self, chunk: dict[str, Any], event_id: str | None) -> bytes:
        return encode_json(chunk) + b"\n"

    def error(self, error: BaseException) -> bytes:
        return self.chunk(ollama_error(500, error_object(error)), None)


class OllamaForm:
    """One request's answer.

    Args:
        model: as the client wrote it.
        is_chat: for /api/chat; else for /api/generate.
        table: names and bytes of tokens, for log-probabilities.
        now_ns: a monotonic clock, for durations. The answer's begin is now.
    """

    def __init__(self, model: str, is_chat: bool, table: TokenBytes, now_ns: Callable[[], int]) -> None:
        self._model = model
        self._is_chat = is_chat
        self._table = table
        self._now_ns = now_ns
        self._began_ns = now_ns()
        self._first_token_ns: int | None = None
        self._calls: list[WholeCall] = []
        self._finished: Finished | None = None

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """A line for each piece of text, and one with the counts. A tool call comes whole."""
        assert not isinstance(event, Echo), "Ollama has no echo"
        if isinstance(event, Delta):
            self.note(event)
            if event.text or event.logprobs:
                yield {**self._said(event.text), **self._logprobs(event)}
            for call in event.tool_calls:
                if call.name is not None:
                    yield from self._called()
                    self._calls.append(WholeCall(call.name))
                self._calls[-1].arguments += call.arguments
        elif isinstance(event, Finished):
            self._finished = event
            yield from self._called()
        elif isinstance(event, Usage):
            assert self._finished is not None, "usage comes last"
            yield {**self._said(""), **self._end(self._finished, event)}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """All of them as one object. Raises EngineFailure where the end is missing."""
        answer = put_together(events)
        whole_calls = [(call, arguments) for call in answer.tool_calls if (arguments := call.as_object()) is not None]
        shown = self._said(answer.text, [_call_object(call, arguments) for call, arguments in whole_calls])
        if answer.logprobs:
            shown["logprobs"] = chat_logprobs(self._table, answer.token_ids, answer.logprobs)
        return {**shown, **self._end(answer.finished, answer.usage)}

    def loaded(self) -> dict[str, Any]:
        """The answer to an empty prompt, with which clients have a model loaded."""
        return {**self._said(""), "done": True, "done_reason": "load"}

    def note(self, event: Event) -> None:
        """This has just come; of what becomes ``chunks`` that is known."""
        if isinstance(event, Delta) and event.token_ids and self._first_token_ns is None:
            self._first_token_ns = self._now_ns()

    def _said(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        head = {"model": self._model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
        if not self._is_chat:
            return {**head, "response": text, "done": False}
        more = {"tool_calls": list(calls)} if calls else {}
        return {**head, "message": {"role": "assistant", "content": text, **more}, "done": False}

    def _called(self) -> Iterator[dict[str, Any]]:
        """The call that is complete now. One that broke off has no arguments to call with."""
        if self._calls and (arguments := self._calls[-1].as_object()) is not None:
            yield self._said("", [_call_object(self._calls[-1], arguments)])

    def _logprobs(self, event: Delta) -> dict[str, Any]:
        if event.logprobs is None:
            return {}
        return {"logprobs": chat_logprobs(self._table, event.token_ids, event.logprobs)}

    def _end(self, finished: Finished, usage: Usage) -> dict[str, Any]:
        now_ns = self._now_ns()
        first_ns = self._first_token_ns or now_ns
        return {
            "done": True,
            "done_reason": "length" if finished.reason is FinishReason.LENGTH else "stop",
            "total_duration": now_ns - self._began_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.num_prompt_tokens,
            "prompt_eval_duration": first_ns - self._began_ns,
            "eval_count": usage.num_completion_tokens,
            "eval_duration": now_ns - first_ns,
        }


def _call_object(call: WholeCall, arguments: dict[str, object]) -> dict[str, Any]:
    return {"function": {"name": call.name, "arguments": arguments}}
