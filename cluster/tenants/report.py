"""What a response says of its tenant's limits: ``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from cluster.tenants.store import Kind, Level


class LimitReport:
    """Of one request; empty where its tenant has no limits."""

    def __init__(self) -> None:
        self._headers: dict[str, str] = {}

    def note(self, kind: Kind, per_minute: int, level: Level) -> None:
        self._headers |= {
            f"x-ratelimit-limit-{kind}": str(per_minute),
            f"x-ratelimit-remaining-{kind}": str(level.remaining),
            f"x-ratelimit-reset-{kind}": duration_text(level.reset_s),
        }

    def headers(self) -> dict[str, str]:
        return self._headers


def duration_text(seconds: float) -> str:
    """As OpenAI writes it: ``250ms``, ``1.5s``, ``6m0s``. Rounded up, so that nobody comes back too early."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


_current: ContextVar[LimitReport | None] = ContextVar("remuda_limit_report", default=None)


def current_report() -> LimitReport:
    """Of the HTTP request that the running task serves; one that nobody reads where there is none."""
    return _current.get() or LimitReport()


@contextlib.contextmanager
def reporting(report: LimitReport) -> Iterator[None]:
    """What runs inside notes its limits in ``report``."""
    token = _current.set(report)
    try:
        yield
    finally:
        _current.reset(token)
