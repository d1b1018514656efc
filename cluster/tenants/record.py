"""What one request used."""

import msgspec

MAX_MODEL_CHARS = 256


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

    def add(self, record: UsageRecord) -> None:
        self.num_requests += 1
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_cached_tokens += record.num_cached_tokens
        self.num_completion_tokens += record.num_completion_tokens
