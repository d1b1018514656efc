"""Limits that hold where the user names none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """See SchedulerConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int
    """With one pipeline stage."""


_LIMITS = {
    # The next plan is drafted while a step runs and leaves when it ends. On a CPU, where a step takes tens of
    # milliseconds, having it at the ranks already gains less than a new request loses by waiting for two steps.
    # A CPU computes some hundred tokens a second and core of a small model: longer chunks would stall all decoding.
    "cpu": Limits(max_num_seqs=64, max_num_batched_tokens=512, depth=1),
    "cuda": Limits(max_num_seqs=256, max_num_batched_tokens=8192, depth=2),
}


def plans_in_flight(device: str, pp: int, plans_ahead: bool | None = None) -> int:
    """One for each of ``pp`` pipeline stages. A further one would only divide the same requests into smaller batches,
    for each of which all weights are read. With one stage: one more where the next is sent while it computes
    (``plans_ahead``; None: as the device likes it)."""
    if pp > 1:
        return pp
    return _LIMITS[device].depth if plans_ahead is None else 1 + plans_ahead


def default_limits(device: str) -> Limits:
    """``device``: cpu or cuda."""
    return _LIMITS[device]
