"""How one connection's part in a request ended, as metrics, traces, logs and accounts say it."""

from dataclasses import dataclass
from typing import Final

from cluster.errors import Cancelled, Draining, TakenOver, mapping_of
from cluster.tenants.audit import CLIENT_LEFT
from engine.errors import RemudaError


@dataclass(frozen=True)
class Ending:
    """``outcome``: as UsageRecord has it. ``status``: the HTTP status that stands for it. ``may_return``: a resumable
    request runs on, and its client may come back for it. ``is_taken_over``: somebody has.
    """

    outcome: str
    status: int
    may_return: bool = False
    is_taken_over: bool = False


_LEFT_STATUS, _LEFT_OUTCOME = CLIENT_LEFT
LEFT: Final = Ending(_LEFT_OUTCOME, _LEFT_STATUS, may_return=True)
COMPLETED: Final = Ending("completed", 200)
DEFECT: Final = Ending("internal", 500)


def ending_of(error: RemudaError) -> Ending:
    """One name for what was cancelled, whether its client left or somebody asked for it."""
    outcome = LEFT.outcome if isinstance(error, Cancelled) else type(error).__name__
    is_taken_over = isinstance(error, TakenOver)
    return Ending(outcome, mapping_of(error).http_status, isinstance(error, Draining), is_taken_over)
