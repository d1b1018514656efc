"""What one request used."""

from typing import Final

import msgspec

MAX_MODEL_CHARS = 256

Amounts = tuple[int, int, int]
"""Tokens: of the prompt, those of it that were cached, and generated ones."""
NOTHING: Final[Amounts] = (0, 0, 0)


def most(one: Amounts, other: Amounts) -> Amounts:
    """What a request was given of which two visits were given these, each from its beginning."""
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def shown(text: str) -> str:
    """What a client wrote, as it can stand in a log: bounded, and without what UTF-8 does not know."""
    return text[:MAX_MODEL_CHARS].encode("utf-8", "replace").decode()


class UsageRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Written when a request has ended, however it ended. No text of prompt or answer is in it.

    ``outcome``: ``completed``, ``cancelled``, ``internal`` or the class of its error. ``status``: the HTTP status that
    stands for it. Tokens are those that were delivered: of a request that was cut short, what had come until then; the
    prompt counts as soon as anything was computed of it. ``trace_id``: of its trace; left out where there is none.
    """

    time_unix_s: float
    request_id: str
    tenant: str
    key_id: str
    model: str
    outcome: str
    status: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    duration_s: float
    trace_id: str = ""

    @property
    def has_used(self) -> bool:
        """Whether there is anything to charge for."""
        return bool(self.num_prompt_tokens or self.num_completion_tokens)

    @property
    def amounts(self) -> Amounts:
        return self.num_prompt_tokens, self.num_cached_tokens, self.num_completion_tokens

    def with_amounts(self, amounts: Amounts) -> "UsageRecord":
        prompt, cached, completion = amounts
        return msgspec.structs.replace(
            self, num_prompt_tokens=prompt, num_cached_tokens=cached, num_completion_tokens=completion
        )


class UsageTotal(msgspec.Struct):
    """Of one tenant, key and model on one day (UTC, ``YYYY-MM-DD``)."""

    day: str
    tenant: str
    key_id: str
    model: str
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def add(self, amounts: Amounts, num_requests: int) -> None:
        self.num_requests += num_requests
        self.num_prompt_tokens += amounts[0]
        self.num_cached_tokens += amounts[1]
        self.num_completion_tokens += amounts[2]
