"""The leader's side of a gang over a channel: starts the ranks, then carries plans to them and results back."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.config import ParallelConfig
from engine.errors import EngineFailure, ProtocolViolation, RankFailure, RemudaError
from engine.executor.blame import find_culprit
from engine.executor.channel import ChannelClosed, LeaderChannel
from engine.executor.flight_record import FlightRecord
from engine.executor.gang_start import GangReady, GangStart, OnMessage
from engine.executor.gang_watch import GangWatch, RankReport
from engine.executor.rank_message import decode_message
from engine.executor.rank_times import RankTimes
from engine.executor.watchdog import Verdict
from engine.messages import LayerExperts, RankError, Shutdown, StepPlan, StepResult, encode
from engine.model_config import ModelConfig


class StepFuture:
    """Whoever waits for it receives what the ranks send: no other thread stands between a result and the engine.

    So it needs no lock and wakes nobody, which an ordinary future spends more time on than on anything else here.
    """

    __slots__ = ("_error", "_receive_until", "_results")

    def __init__(self, receive_until: Callable[["StepFuture", float | None], None]) -> None:
        self._receive_until = receive_until
        self._results: list[StepResult] | None = None
        self._error: RemudaError | None = None

    def done(self) -> bool:
        return self._results is not None or self._error is not None

    def result(self, timeout: float | None = None) -> list[StepResult]:
        """See Executor. Raises TimeoutError where the ranks have not answered within ``timeout`` seconds."""
        if self._results is None and self._error is None:
            self._receive_until(self, timeout)
        if self._error is not None:
            raise self._error
        if self._results is None:
            raise TimeoutError(f"the step was not answered within {timeout} s")
        return self._results

    def set_result(self, results: list[StepResult]) -> None:
        self._results = results

    def set_exception(self, error: RemudaError) -> None:
        self._error = error


@dataclass(slots=True)
class _PendingStep:
    """A plan on its way, and the ranks' answers so far."""

    plan: StepPlan
    sent_s: float
    future: StepFuture
    results: dict[int, StepResult] = field(default_factory=dict)


class ChannelExecutor:
    """One gang, one epoch: ``start`` first, then an Executor (see there).

    Args:
        channel: owned from now on, and closed by ``close``.
        stall_timeout_s: a start in which no rank reports anything for so long has failed. A rank that reads weights
            reports all the time.
        step_timeout_s: a step of which nobody knows how long it takes has failed when it takes longer; see GangWatch.
        record: of the replica; None keeps one that nobody reads.
        on_failure: called once, from any thread, when the gang broke; also while no plan is on its way.
        times: of the replica; None keeps some that nobody reads.
        host_of: see GangWatch.
    """

    def __init__(
        self,
        channel: LeaderChannel,
        parallel: ParallelConfig,
        *,
        epoch: int = 0,
        stall_timeout_s: float = 600.0,
        step_timeout_s: float = 120.0,
        record: FlightRecord | None = None,
        on_failure: Callable[[RemudaError], None] = lambda error: None,
        times: RankTimes | None = None,
        host_of: Callable[[int], str] = lambda rank: "",
    ) -> None:
        self._times = times or RankTimes(parallel.num_ranks)
        self._channel = channel
        self._num_ranks = parallel.num_ranks
        self._num_stages = parallel.pp
        # The sampling rank of each dp group: tp rank 0 of the last stage.
        first = (parallel.pp - 1) * parallel.dp * parallel.tp
        self._sampling_ranks = [first + group * parallel.tp for group in range(parallel.dp)]
        self._epoch = epoch
        self._stall_timeout_s = stall_timeout_s
        self._step_timeout_s = step_timeout_s
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._pending: deque[_PendingStep] = deque()
        self._prepared: tuple[StepPlan, bytes] | None = None
        self._lesson: tuple[StepPlan, float, float] | None = None
        """A plan that was answered, when, and after how long; it is learnt from when the next plan has left."""
        self._failure: RemudaError | None = None
        self._closing = False
        self._is_untold = False
        self._receiving = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._record = record or FlightRecord()
        self._watch_over = GangWatch(channel, parallel, step_timeout_s, self._note_verdict, host_of=host_of)

    def start(
        self,
        model: ModelConfig,
        *,
        block_size: int,
        max_model_len: int | None = None,
        on_message: OnMessage = lambda message: None,
        experts: Sequence[LayerExperts] = (),
    ) -> GangReady:
        """Waits until all ranks have loaded, sizes the cache, and waits until they are ready.

        ``max_model_len`` None: the longest that fits. ``experts``: see InitCache.

        Raises what a rank raised (CheckpointError, …), DoesNotFit, or RankFailure; ``close`` is to be called all the
        same.
        """
        start = GangStart(
            self._channel, self._num_ranks, self._epoch, self._stall_timeout_s, on_message, self._check_processes
        )
        ready = start.run(model, self._num_stages, block_size, max_model_len, experts)
        self._record.describe(num_ranks=self._num_ranks, sampling_ranks=self._sampling_ranks)
        self._record.event("epoch", epoch=self._epoch, num_blocks=ready.cache.num_blocks)
        self._watch_over.start([hello.device for hello in ready.ranks])
        self._watcher = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._watcher.start()
        return ready

    def _check_processes(self) -> None:
        """Raises RankFailure where a rank's process has ended before it was ready. Somebody else watches them here."""

    def prepare(self, plan: StepPlan) -> None:
        """See Executor."""
        self._prepared = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> StepFuture:
        """See Executor. Calls come one at a time."""
        assert self._watcher is not None, "start comes first"
        prepared, self._prepared = self._prepared, None
        is_prepared = prepared is not None and prepared[0] is plan
        data = prepared[1] if prepared is not None and is_prepared else encode(plan)
        if not self._pending and not is_prepared:  # a prepared one follows a result at once
            with self._receiving:
                self._receive(0.0)  # an answer that nobody has asked for yet
            self._tell_failure()
        future = StepFuture(self._receive_until)
        pending = _PendingStep(plan, time.monotonic(), future)
        with self._lock:
            if not self._pending:
                self._watch_over.begin(pending.sent_s)
            if self._failure is not None:
                pending.future.set_exception(self._failure)
                return pending.future
            self._pending.append(pending)
        try:
            self._channel.send(data)
        except RankFailure:
            pass  # whoever receives hears of it too, and of what the rank said before: its reason is the better one
        except (ProtocolViolation, ChannelClosed) as error:
            self._fail(error)
            self._tell_failure()
        # Nothing of this may keep a plan from leaving.
        self._record.plan(pending.sent_s, data)
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            self._watch_over.learn(*lesson)
        return pending.future

    # ---- receiving, in the thread that waits for a future, or the watcher's ---------------------------------------

    def _receive_until(self, future: StepFuture, timeout_s: float | None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._receiving:
            while not future.done() and (end is None or end > time.monotonic()):
                self._receive(None if end is None else end - time.monotonic())
        if self._is_untold:
            self._tell_failure()

    def _watch(self) -> None:
        """Nobody waits for a future while no plan is on its way, and ranks can be lost then too."""
        while self._failure is None:
            self._channel.wait_lost()
            with self._receiving:
                self._receive(0.0)
            self._tell_failure()

    def _receive(self, timeout_s: float | None) -> None:
        try:
            self._take(timeout_s)
        except ChannelClosed:
            self._fail(RankFailure("the gang was closed"))
        except RemudaError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  (a defect: whatever it is, plans on their way must end)
            self._fail(ProtocolViolation(f"taking in results failed: {type(error).__name__}: {error}"))

    def _take(self, timeout_s: float | None) -> None:
        """One message, or none in ``timeout_s`` or before it is time to look where the ranks are."""
        left = timeout_s
        if self._pending:
            due = self._watch_over.left_s(time.monotonic())
            if due <= 0.0:
                self._look()
            left = due if left is None else min(left, due)
        try:
            rank, data = self._channel.receive(None if left is None else max(0.0, left))
        except TimeoutError:
            return
        self._record.answer(time.monotonic(), rank, data)
        message = decode_message(data, rank)
        if isinstance(message, RankError):
            raise find_culprit(self._channel, message, self._num_ranks)
        if not isinstance(message, StepResult):
            raise ProtocolViolation(f"rank {rank} sent {type(message).__name__} after its start")
        self._accept(rank, message)

    def _look(self) -> None:
        """Raises RankFailure where a rank hangs."""
        with self._lock:
            if not self._pending:
                return
            oldest = self._pending[0]
        self._watch_over.look(oldest.plan, [rank for rank in range(self._num_ranks) if rank not in oldest.results])

    def _accept(self, rank: int, result: StepResult) -> None:
        """Ranks answer in order, so what all have answered is always the oldest."""
        with self._lock:
            due = None
            for pending in self._pending:
                if rank not in pending.results:
                    due = pending
                    break
            if due is None or result.step != due.plan.step or result.epoch != self._epoch:
                raise ProtocolViolation(
                    f"rank {rank} answers step {result.step} of epoch {result.epoch}; due is "
                    f"{'none' if due is None else due.plan.step} of epoch {self._epoch}"
                )
            due.results[rank] = result
            if len(due.results) < self._num_ranks:
                return
            self._pending.popleft()
        now = time.monotonic()
        self._lesson = due.plan, now, now - due.sent_s
        self._times.answered(due.results)
        due.future.set_result(by_dp_group(due.results, self._sampling_ranks))

    def _note_verdict(self, verdict: Verdict) -> None:
        self._record.event("verdict", rank=verdict.rank, reason=verdict.reason, is_final=verdict.is_final)

    def _fail(self, error: RemudaError) -> None:
        """Of all failures the first is kept."""
        with self._lock:
            if self._failure is None and not self._closing:
                self._is_untold = True
                culprit = error.rank if isinstance(error, RankFailure) else None
                self._record.event("failure", epoch=self._epoch, rank=culprit, error=str(error))
            self._failure = self._failure or error
            failed, self._pending = self._pending, deque()
        for pending in failed:
            pending.future.set_exception(self._failure)

    def _tell_failure(self) -> None:
        """Without any lock: whoever hears of it may close this object at once."""
        with self._lock:
            is_untold, self._is_untold = self._is_untold, False
        if is_untold and self._failure is not None:
            self._on_failure(self._failure)

    @property
    def failure(self) -> RemudaError | None:
        """Why the gang broke, also while no plan is on its way."""
        return self._failure

    @property
    def progress_limit_s(self) -> float:
        """How long a step may take before it counts as stalled."""
        return self._watch_over.limit_s

    def reports(self) -> list[RankReport]:
        """What each rank is about, without asking it. From any thread; nothing after ``close``."""
        return self._watch_over.reports()

    def close(self) -> None:
        """Asks the ranks to leave, and cuts their connections."""
        self._end(Shutdown("the gang is closed"))

    def disband(self) -> None:
        """Ends this formation: cuts the ranks' connections. They keep their weights and wait for the next one."""
        self._end(None)

    def _end(self, order: Shutdown | None) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._fail(RankFailure("the gang was closed"))
        if order is not None:
            with contextlib.suppress(EngineFailure):  # a rank that is gone needs no asking
                self._channel.send(encode(order))
        self._channel.close()
        if self._watcher not in (None, threading.current_thread()):  # on_failure may close, in the watcher's thread
            self._watcher.join()


def by_dp_group(results: dict[int, StepResult], sampling_ranks: Sequence[int]) -> list[StepResult]:
    """What the engine gets of all ranks' answers: the sampling ranks', the first with everybody's news of adapters and
    experts."""
    groups = [results[rank] for rank in sampling_ranks]
    if len(results) == 1:
        return groups
    for result in results.values():
        if result.adapters or result.expert_outcomes or result.expert_loads:
            return _with_news(groups, [results[rank] for rank in sorted(results)])
    return groups


def _with_news(groups: list[StepResult], every: list[StepResult]) -> list[StepResult]:
    groups = [msgspec.structs.replace(result, adapters=[], expert_outcomes=[], expert_loads=[]) for result in groups]
    groups[0] = msgspec.structs.replace(
        groups[0],
        adapters=[outcome for result in every for outcome in result.adapters],
        expert_outcomes=[outcome for result in every for outcome in result.expert_outcomes],
        expert_loads=[loads for result in every for loads in result.expert_loads],
    )
    return groups
