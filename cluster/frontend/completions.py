"""/v1/completions: the request as a call, its events as OpenAI's JSON, whole or in chunks."""

from collections.abc import Iterator
from typing import Any

from cluster.frontend.calls import Call, Delta, Echo, Event, Finished, Started, Usage
from cluster.frontend.logprob_forms import completion_logprobs, join_completion_logprobs
from cluster.frontend.openai_schema import CompletionBody
from cluster.frontend.token_bytes import TokenBytes
from engine.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


def completion_call(body: CompletionBody, request_id: str) -> Call:
    """Raises InvalidRequest."""
    body.refuse_what_is_not_served()
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest(f"best_of must equal n ({n}) or be left out; ranking choices is not served", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens must be at least 1 (0 only with echo)", "max_tokens")
    return Call(
        request_id=request_id,
        prompts=body.prompts(),
        model=body.model,
        options=body.options(body.max_tokens, body.logprobs, body.logprobs if body.echo else None),
        n=n,
        stop=body.stops,
        echo=bool(body.echo),
        limits=body.limits,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


class CompletionForm:
    """One request's answer.

    Args:
        call: what was asked.
        body: how it is to be shown.
        model: the served name.
        created_unix_s: for ``created``.
        table: names of tokens, for log-probabilities.
    """

    def __init__(self, call: Call, body: CompletionBody, model: str, created_unix_s: int, table: TokenBytes) -> None:
        self._head = {
            "id": call.request_id,
            "object": "text_completion",
            "created": created_unix_s,
            "model": model,
        }
        self._n = call.n
        self._num_logprobs = call.options.logprobs
        self._with_ids = bool(body.return_token_ids)
        self._includes_usage = body.includes_usage
        self._table = table
        self._prompt_ids: list[list[int]] = []
        self._base: dict[int, int] = {}
        """Characters of the echoed prompt before each choice's own text."""
        self._named_prompt: set[int] = set()

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The stream's form."""
        if isinstance(event, Started):
            self._prompt_ids = [list(ids) for ids in event.prompt_token_ids]
        elif isinstance(event, Usage):
            if self._includes_usage:
                yield {**self._head, "choices": [], "usage": usage_object(event)}
        else:
            choice = self._piece(event)
            if self._with_ids and event.choice not in self._named_prompt:
                self._named_prompt.add(event.choice)
                choice["prompt_token_ids"] = self._prompt_ids[event.choice // self._n]
            chunk = {**self._head, "choices": [choice]}
            if self._includes_usage:
                chunk["usage"] = None
            yield chunk

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """All of a request's events as one object."""
        pieces: dict[int, list[dict[str, Any]]] = {}
        usage: dict[str, Any] | None = None
        for event in events:
            if isinstance(event, Started):
                self._prompt_ids = [list(ids) for ids in event.prompt_token_ids]
            elif isinstance(event, Usage):
                usage = usage_object(event)
            else:
                pieces.setdefault(event.choice, []).append(self._piece(event))
        choices = [self._joined(index, pieces[index]) for index in sorted(pieces)]
        return {**self._head, "choices": choices, "usage": usage}

    def _piece(self, event: Echo | Delta | Finished) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": event.choice, "text": "", "logprobs": None, "finish_reason": None}
        choice["stop_reason"] = None
        if isinstance(event, Finished):
            choice["finish_reason"] = event.reason.value
            choice["stop_reason"] = event.stop_string if event.stop_string is not None else event.stop_token_id
            return choice
        choice["text"] = event.text
        if event.logprobs is not None and self._num_logprobs is not None:
            base = self._base.get(event.choice, 0)
            offsets = [base + offset for offset in event.text_offsets]
            choice["logprobs"] = completion_logprobs(
                self._table, event.token_ids, event.logprobs, offsets, self._num_logprobs
            )
        if isinstance(event, Echo):
            self._base[event.choice] = len(event.text)
        elif self._with_ids:
            choice["token_ids"] = list(event.token_ids)
        return choice

    def _joined(self, index: int, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        end = pieces[-1]
        choice = {
            "index": index,
            "text": "".join(piece["text"] for piece in pieces),
            "logprobs": join_completion_logprobs([piece["logprobs"] for piece in pieces if piece["logprobs"]]),
            "finish_reason": end["finish_reason"],
            "stop_reason": end["stop_reason"],
        }
        if self._with_ids:
            choice["prompt_token_ids"] = self._prompt_ids[index // self._n]
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.get("token_ids", ())]
        return choice
