"""Tells ranks that are busy, however long their step takes, from ranks that hang. Pure: samples, plans and a clock in,
verdicts out; the shell around it is engine.executor.gang_watch.

Ranks wait for each other in collectives, so when one hangs all do. What they say of themselves (engine/progress.py)
makes a graph: who waits for whom. Whoever is waited for and waits for nobody is where it hangs, and is *suspect* as
long as it does not move. What the kernel says of its process decides how long that is suffered:

    stopped (SIGSTOP, a debugger)                  STOPPED_S
    asleep, without any processor time             ASLEEP_S (a rank without a plan: LATE_PLAN_S)
    its host does not report any more              SILENT_S (named after SUSPECT_S: links heal by themselves)
    anything else: it computes, or may             until its plan has taken PLAN_FACTOR × its predicted time

A rank that moves, however slowly, is busy. Time in which nobody watched does not count, so a host that was suspended
as a whole raises no alarm.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.config import ParallelConfig
from engine.progress import Axis, Operation, RankSample

STOPPED_S = 1.0
ASLEEP_S = 1.5
SUSPECT_S = 1.5
SILENT_S = 5.0
LATE_PLAN_S = 5.0
"""For a rank that waits for a plan which the leader has sent."""
PLAN_FACTOR = 12.0
MIN_PLAN_S = 10.0
"""A plan may always take so long: a kernel may be compiled in the middle of it."""
UNMOVED_S = 5.0
"""Nobody is blamed for a late plan who has moved within so long."""
ASLEEP_CPU_SHARE = 0.05
"""Of one core. Other threads of the process wake now and then."""
_MAX_TICK_S = 0.5


class RankState(enum.StrEnum):
    """What a rank is about."""

    IDLE = "idle"
    """It waits for a plan."""
    BUSY = "busy"
    """It computes, or waits for others that do."""
    STALLED = "stalled"
    DEAD = "dead"


@dataclass(frozen=True)
class PendingPlan:
    """The oldest plan that some ranks have not answered. ``predicted_s`` None: nobody knows how long it takes."""

    step: int
    unanswered: Sequence[int]
    predicted_s: float | None


@dataclass(frozen=True)
class Verdict:
    """``rank`` None: no single one is to blame. ``is_final``: the gang cannot go on with it; else it is named, and may
    come back. ``sample``: where it stands."""

    rank: int | None
    reason: str
    is_final: bool
    sample: RankSample | None


@dataclass
class _Track:
    """A rank that was seen before. ``unmoved_s``: since it moved; ``suspect_s``: of that, as what others wait for."""

    sample: RankSample
    cpu_s: float = 0.0
    """When it had not moved for the first time."""
    has_cpu: bool = False
    unmoved_s: float = 0.0
    suspect_s: float = 0.0
    measured_s: float = 0.0
    """For which processor time is known."""
    named: set[str] = field(default_factory=set)

    def move_on(self, sample: RankSample, tick_s: float, is_suspect: bool) -> None:
        if sample.signature != self.sample.signature:
            self.unmoved_s = self.suspect_s = self.measured_s = 0.0
            self.has_cpu = False
            self.named.clear()
        else:
            self.unmoved_s += tick_s
            self.suspect_s = self.suspect_s + tick_s if is_suspect else 0.0
            if self.has_cpu:
                self.measured_s += tick_s
            elif sample.process_state:
                self.has_cpu, self.cpu_s = True, sample.cpu_s
        self.sample = sample

    @property
    def sleeps(self) -> bool:
        """Without processor time in ASLEEP_S."""
        sample = self.sample
        used = sample.cpu_s - self.cpu_s
        return sample.process_state == "S" and self.measured_s >= ASLEEP_S and used < ASLEEP_CPU_SHARE * self.measured_s


class Watchdog:
    """Of one formation of a gang.

    Args:
        plan_timeout_s: for plans of which nobody knows how long they take.
        is_asynchronous: the ranks' devices work on when the ranks have passed (GPUs), so that a rank waits for others
            where it waits for its device.
    """

    def __init__(
        self, parallel: ParallelConfig, plan_timeout_s: float = 120.0, *, is_asynchronous: bool = False
    ) -> None:
        self._parallel = parallel
        self._plan_timeout_s = plan_timeout_s
        self._is_asynchronous = is_asynchronous
        self._tracks: dict[int, _Track] = {}
        self._now_s: float | None = None
        self._step = -1
        self._plan_age_s = 0.0
        self._has_blamed_all = False

    def rest(self) -> None:
        """No plan is on its way; what passes until the next ``observe`` does not count."""
        self._now_s = None

    def observe(self, now_s: float, samples: Sequence[RankSample], plan: PendingPlan) -> list[Verdict]:
        """What is new since the last call, at most one verdict per rank and reason. To be called every 0.25 s or so
        while a plan is on its way."""
        tick_s = 0.0 if self._now_s is None else min(_MAX_TICK_S, max(0.0, now_s - self._now_s))
        self._now_s = now_s
        if plan.step != self._step:
            self._step, self._plan_age_s, self._has_blamed_all = plan.step, 0.0, False
        else:
            self._plan_age_s += tick_s
        by_rank = {sample.rank: sample for sample in samples}
        suspects = self._suspects(by_rank, plan)
        for sample in samples:
            track = self._tracks.setdefault(sample.rank, _Track(sample))
            track.move_on(sample, tick_s, sample.rank in suspects)
        unknown = [rank for rank in suspects if by_rank[rank].operation == Operation.UNKNOWN]
        known = sorted(suspects.difference(unknown))
        all_wait = len(known) > 1 and all(by_rank[rank].waits for rank in known)
        verdicts = [verdict for rank in known for verdict in self._judge(self._tracks[rank], plan, all_wait)]
        if not verdicts and unknown:
            verdicts = self._blame_silent(plan, sorted(unknown))
        elif not verdicts and all_wait:
            verdicts = self._blame_all(plan)
        # What is certain first.
        return sorted(verdicts, key=lambda verdict: not verdict.is_final)

    # ---- who waits for whom ---------------------------------------------------------------------------------------

    def _suspects(self, by_rank: dict[int, RankSample], plan: PendingPlan) -> set[int]:
        """The leader waits for all that have not answered, these for others, and so on: the ends of the chains."""
        ends: set[int] = set()
        seen: set[int] = set()
        open_ends = [rank for rank in plan.unanswered if rank in by_rank]
        while open_ends:
            rank = open_ends.pop()
            if rank in seen:
                continue
            seen.add(rank)
            # One that waits although everybody has come is an end too: it was stopped, or what was sent is lost.
            awaited = self._awaited_by(by_rank[rank], by_rank)
            open_ends += awaited
            if not awaited:
                ends.add(rank)
        return ends

    def _awaited_by(self, sample: RankSample, by_rank: dict[int, RankSample]) -> list[int]:
        rank, parallel = sample.rank, self._parallel
        stride = parallel.dp * parallel.tp
        awaited: list[int] = []
        for axis, size in ((Axis.TP, parallel.tp), (Axis.STAGE, stride)):
            number = sample.axes[axis].waits_in
            if number:
                first = rank // size * size
                peers = [peer for peer in range(first, first + size) if peer in by_rank]
                awaited += [peer for peer in peers if by_rank[peer].axes[axis].entered < number]
        before, after = sample.axes[Axis.PREVIOUS].waits_in, sample.axes[Axis.NEXT].waits_in
        if before and (peer := by_rank.get(rank - stride)) is not None and peer.axes[Axis.NEXT].entered < before:
            awaited.append(rank - stride)
        if after:  # there is no room before the receiver has taken something
            awaited += [peer for peer in (rank + stride,) if peer in by_rank]
        if not awaited and self._is_asynchronous and sample.operation == Operation.SAMPLE:
            first = rank // stride * stride
            peers = [peer for peer in range(first, first + stride) if peer in by_rank]
            awaited = [peer for peer in peers if _is_behind(by_rank[peer], sample)]
        return awaited

    # ---- what is suffered -----------------------------------------------------------------------------------------

    def _judge(self, track: _Track, plan: PendingPlan, all_wait: bool) -> Iterable[Verdict]:
        sample, suspect_s = track.sample, track.suspect_s
        is_late_plan = sample.operation == Operation.IDLE
        if suspect_s >= SUSPECT_S and sample.report_age_s >= SUSPECT_S:
            # What was last known of it is no evidence any more.
            is_final = suspect_s >= SILENT_S
            yield from self._once(track, "its host reports nothing", sample.report_age_s, is_final)
        elif sample.process_state in ("Z", "X"):
            yield from self._once(track, "its process has ended", suspect_s, True)
        elif sample.process_state in ("T", "t") and suspect_s >= STOPPED_S:
            yield from self._once(track, "its process is stopped", suspect_s, True)
        elif self._is_asleep(track) and suspect_s >= (LATE_PLAN_S if is_late_plan else ASLEEP_S):
            what = "it has not taken the plan" if is_late_plan else "its process sleeps"
            yield from self._once(track, what, suspect_s, True)
        elif not all_wait and self._is_overdue(plan) and track.unmoved_s >= self._unmoved_s(plan):
            yield from self._once(track, self._late(plan), track.unmoved_s, True)

    def _is_asleep(self, track: _Track) -> bool:
        """A rank may sleep while it reads a file, while its GPU works, or while what others sent is on its way."""
        operation = track.sample.operation
        may_sleep = operation == Operation.LOAD_ADAPTER or self._is_asynchronous or track.sample.waits
        return track.sleeps and (operation == Operation.IDLE or not may_sleep)

    def _blame_silent(self, plan: PendingPlan, ranks: list[int]) -> list[Verdict]:
        """Nobody knows what they do, so only a single one can be blamed: others may merely wait for it."""
        if self._plan_age_s < self._plan_timeout_s or self._has_blamed_all:
            return []
        self._has_blamed_all = True
        names = ", ".join(map(str, ranks))
        reason = f"step {plan.step} was not answered within {self._plan_timeout_s:g} s by rank {names}"
        return [Verdict(ranks[0] if len(ranks) == 1 else None, reason, True, None)]

    def _blame_all(self, plan: PendingPlan) -> list[Verdict]:
        """All wait, and all have come: what was sent is lost on the way."""
        tracks = [self._tracks[rank] for rank in plan.unanswered if rank in self._tracks]
        is_stuck = bool(tracks) and min(track.unmoved_s for track in tracks) >= self._unmoved_s(plan)
        if not is_stuck or self._has_blamed_all or not self._is_overdue(plan):
            return []
        self._has_blamed_all = True
        where = "; ".join(f"rank {track.sample.rank} in {track.sample.describe()}" for track in tracks)
        silent = [track.sample.rank for track in tracks if track.sample.report_age_s >= SUSPECT_S]
        rank = silent[0] if silent else None
        return [Verdict(rank, f"{self._late(plan)}, and all wait for each other: {where}", True, None)]

    def _is_overdue(self, plan: PendingPlan) -> bool:
        return self._plan_age_s >= self.bound_s(plan)

    def _unmoved_s(self, plan: PendingPlan) -> float:
        """Where nobody knows how long a plan takes, one layer of it may be long too."""
        return UNMOVED_S if plan.predicted_s is not None else self._plan_timeout_s / 2

    def bound_s(self, plan: PendingPlan) -> float:
        """How long a plan may take in which nothing moves."""
        if plan.predicted_s is None:
            return self._plan_timeout_s
        return max(MIN_PLAN_S, PLAN_FACTOR * plan.predicted_s)

    def _late(self, plan: PendingPlan) -> str:
        expected = "" if plan.predicted_s is None else f", where {plan.predicted_s:.3g} s were expected"
        return f"step {plan.step} has taken {self._plan_age_s:.1f} s{expected}"

    def _once(self, track: _Track, what: str, seconds: float, is_final: bool) -> Iterable[Verdict]:
        key = f"{what.partition(' has taken ')[0]} {is_final}"
        if key not in track.named:
            track.named.add(key)
            sample = track.sample
            reason = f"rank {sample.rank} does not go on in {sample.describe()}: {what} (for {seconds:.1f} s)"
            yield Verdict(sample.rank, reason, is_final, sample)

    def state_of(self, sample: RankSample) -> RankState:
        """Of a fresh sample, in the light of the last ``observe``."""
        if sample.process_state in ("Z", "X"):
            return RankState.DEAD
        track = self._tracks.get(sample.rank)
        is_named = track is not None and bool(track.named) and track.sample.signature == sample.signature
        if is_named or sample.process_state in ("T", "t"):
            return RankState.STALLED
        return RankState.IDLE if sample.operation in (Operation.UNKNOWN, Operation.IDLE) else RankState.BUSY


def _is_behind(sample: RankSample, other: RankSample) -> bool:
    if sample.step != other.step:
        return sample.step < other.step
    return sample.operation not in (Operation.SAMPLE, Operation.IDLE)
