"""What is promised of a gang that loses a rank, and whether a run of bench.recovery kept it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_GAP_WITH_SPARE_S = 3.0
FURTHER_S = 2.0
"""Beside what a new process cannot but do, where no spare stands by."""
MAX_READ_BYTES = 1_000_000
MIN_THROUGHPUT_RATIO = 0.95


@dataclass(frozen=True)
class Verdict:
    """One promise: the figure, its bound, and whether it was kept."""

    what: str
    figure: str
    bound: str
    was_kept: bool

    def __str__(self) -> str:
        return f"{'kept  ' if self.was_kept else 'MISSED'}  {self.what}: {self.figure}, promised {self.bound}"


def gap_bound_s(spare_ranks: int, slowest_rank_s: Mapping[str, float]) -> float:
    """Seconds that the gap, less the prefill of what was lost, may take.

    Without a spare: import, rendezvous and shard of that formation, and FURTHER_S. The others wait in their rendezvous
    while the newcomer imports, so the slowest rendezvous has the import in it, which counts once.
    """
    if spare_ranks:
        return MAX_GAP_WITH_SPARE_S
    return max(slowest_rank_s["import"], slowest_rank_s["rendezvous"]) + slowest_rank_s["load"] + FURTHER_S


def verdicts(found: Mapping[str, Any]) -> list[Verdict]:
    """``found``: as bench.recovery.measure gives it."""
    gap_s, num_read, ratio = found["gap_less_prefill_s"], found["survivors_read_bytes"], found["throughput_ratio"]
    bound_s = gap_bound_s(found["spare_ranks"], found["slowest_rank_s"])
    kept = found["survivors_keep_pid"]
    return [
        Verdict("gap less the prefill of the same tokens", f"{gap_s:.2f} s", f"≤ {bound_s:.2f} s", gap_s <= bound_s),
        Verdict("survivors keep their processes", "yes" if kept else "no", "yes", kept),
        Verdict("survivors read", f"{num_read:,} B", f"< {MAX_READ_BYTES:,} B", num_read < MAX_READ_BYTES),
        Verdict(
            "throughput after ÷ before", f"{ratio:.3f}", f"≥ {MIN_THROUGHPUT_RATIO:g}", ratio >= MIN_THROUGHPUT_RATIO
        ),
    ]
