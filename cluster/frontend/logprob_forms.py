"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.frontend.token_bytes import TokenBytes
from engine.request import TopLogprobs

_LOWEST = -9999.0
"""OpenAI's stand-in for log 0, which JSON cannot say."""


def _number(logprob: float) -> float:
    return max(logprob, _LOWEST)


def completion_logprobs(
    table: TokenBytes,
    token_ids: Sequence[int],
    logprobs: Sequence[TopLogprobs | None],
    text_offsets: Iterable[int],
    count: int,
) -> dict[str, Any]:
    """/v1/completions: parallel lists. Where two alternatives look alike (parts of characters), the likelier stays.

    Args:
        table: names of tokens.
        token_ids: the chosen tokens.
        logprobs: of each; None where there is none (a prompt's first token).
        text_offsets: where each begins in the choice's text.
        count: alternatives per token; 0 gives no ``top_logprobs``.
    """
    tops: list[dict[str, float] | None] = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        tops.append(None if entry is None else _top(table, token_id, entry))
    return {
        "tokens": [table.name(token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else _number(entry.logprob) for entry in logprobs],
        "top_logprobs": tops if count else None,
        "text_offset": list(text_offsets),
    }


def _top(table: TokenBytes, token_id: int, entry: TopLogprobs) -> dict[str, float]:
    top: dict[str, float] = {}
    for other, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
        top.setdefault(table.name(other), _number(logprob))
    top.setdefault(table.name(token_id), _number(entry.logprob))
    return top


def join_completion_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Consecutive pieces as one."""
    if not parts:
        return None
    joined: dict[str, Any] = {}
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        pieces = [part[key] for part in parts]
        joined[key] = None if pieces[0] is None else [entry for piece in pieces for entry in piece]
    return joined


def chat_logprobs(table: TokenBytes, token_ids: Sequence[int], logprobs: Sequence[TopLogprobs]) -> list[dict[str, Any]]:
    """/v1/chat/completions: one object per token, with its bytes."""
    return [
        {
            **_chat_token(table, token_id, entry.logprob),
            "top_logprobs": [
                _chat_token(table, other, logprob)
                for other, logprob in zip(entry.token_ids, entry.logprobs, strict=True)
            ],
        }
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]


def _chat_token(table: TokenBytes, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": table.name(token_id), "logprob": _number(logprob), "bytes": list(table.raw(token_id))}
