"""Outputs of one request that waited for a slow reader become one."""

from collections.abc import Sequence
from typing import TypeVar

from engine.request import Output

_Entry = TypeVar("_Entry")


def merge(parts: Sequence[Output]) -> Output:
    """Outputs that follow one another, at least one, as one. Only the last may have a finish reason."""
    last = parts[-1]
    assert all(part.finish_reason is None for part in parts[:-1]), f"{last.request_id} has an output after its finish"
    return Output(
        request_id=last.request_id,
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        logprobs=_joined([part.logprobs for part in parts]),
        prompt_logprobs=_joined([part.prompt_logprobs for part in parts]),
        num_cached_tokens=max(part.num_cached_tokens for part in parts),
        error=last.error,
        waits=next((part.waits for part in parts if part.waits is not None), None),
        pooled=last.pooled,
    )


def _joined(lists: list[list[_Entry] | None]) -> list[_Entry] | None:
    if all(entries is None for entries in lists):
        return None
    return [entry for entries in lists if entries is not None for entry in entries]
