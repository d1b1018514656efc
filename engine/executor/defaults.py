"""Limits that hold where the user names none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """See SchedulerConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int


_LIMITS = {
    # A CPU computes some hundred tokens a second and core of a small model: longer chunks would stall all decoding.
    "cpu": Limits(max_num_seqs=64, max_num_batched_tokens=512),
    "cuda": Limits(max_num_seqs=256, max_num_batched_tokens=8192),
}


def default_limits(device: str) -> Limits:
    """``device``: cpu or cuda."""
    return _LIMITS[device]
