"""Outputs of one request that wait for a slow reader become one."""

from typing import TypeVar

from engine.request import Output

_Entry = TypeVar("_Entry")


def merge(first: Output, second: Output) -> Output:
    """The two, which follow one another, as one. ``first`` has no finish reason."""
    assert first.finish_reason is None, f"request {first.request_id} has an output after its finish"
    return Output(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        logprobs=_joined(first.logprobs, second.logprobs),
        prompt_logprobs=_joined(first.prompt_logprobs, second.prompt_logprobs),
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        error=second.error,
    )


def _joined(first: list[_Entry] | None, second: list[_Entry] | None) -> list[_Entry] | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
