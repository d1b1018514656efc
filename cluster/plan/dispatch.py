"""Which form of expert parallelism a layout has, and what spoke for it. Data only."""

from dataclasses import dataclass

from engine.config import ParallelConfig

LEAST_GAIN = 0.1
"""Of all-to-all over the replicated form, to be chosen: waits within a host and products are not in the estimate."""


@dataclass(frozen=True)
class DecodeLoad:
    """``num_requests`` of ``context_len`` tokens each want to decode at once."""

    num_requests: int
    context_len: int


@dataclass(frozen=True)
class DecodeEstimate:
    """``kv_tokens``: see LayoutPlan. ``num_requests``: as many of the load's as the cache holds. ``tokens_per_s``: that
    all of them get together."""

    layout: ParallelConfig
    kv_tokens: int
    num_requests: int
    tokens_per_s: float


@dataclass(frozen=True)
class DispatchChoice:
    """What each form is predicted to do under ``load``; None: no layout of the form fits. ``knows_link``: layouts that
    exchange tokens between hosts were among them."""

    load: DecodeLoad
    replicated: DecodeEstimate | None
    exchanged: DecodeEstimate | None
    knows_link: bool


def gains(exchanged: DecodeEstimate, replicated: DecodeEstimate | None) -> bool:
    """Enough to be chosen."""
    least = 0.0 if replicated is None else (1 + LEAST_GAIN) * replicated.tokens_per_s
    return exchanged.tokens_per_s > 0 and exchanged.tokens_per_s >= least
