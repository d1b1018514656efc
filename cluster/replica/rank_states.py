"""What a replica's ranks are about, as ``remuda status`` and the metrics show them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.types import RankInfo
from engine.errors import RankFailure, RemudaError
from engine.executor.gang_watch import RankReport
from engine.executor.watchdog import RankState

ENDED = "ended"
"""A rank that went because another one was lost."""


class WatchedGang(Protocol):
    """A gang of which it is known where its ranks are (engine.executor.channel_executor)."""

    @property
    def progress_limit_s(self) -> float: ...
    def reports(self) -> list[RankReport]: ...


def rank_infos(
    ranks: Sequence[RankInfo], gang: WatchedGang | None, failure: RemudaError | None
) -> tuple[RankInfo, ...]:
    """``ranks`` as they are now. When the gang has failed, the rank that was lost is stalled or dead, and the others
    have ended because of it."""
    reports = {report.sample.rank: report for report in (gang.reports() if gang is not None else [])}
    found = [_with(rank, reports.get(rank.rank)) for rank in ranks]
    if failure is None:
        return tuple(found)
    lost = failure.rank if isinstance(failure, RankFailure) else None
    return tuple(replace(rank, state=ENDED if rank.rank != lost else _loss(rank.state)) for rank in found)


def _with(rank: RankInfo, report: RankReport | None) -> RankInfo:
    if report is None:
        return rank
    sample = report.sample
    return replace(
        rank,
        state=report.state.value,
        step=sample.step,
        operation=sample.place,
        since_s=sample.report_age_s
        + min([sample.place_age_s, *(axis.wait_age_s for axis in sample.axes if axis.waits_in)]),
    )


def _loss(state: str) -> str:
    return state if state == RankState.STALLED else RankState.DEAD.value
