"""The leader's side of a gang over a channel: starts the ranks, then carries plans to them and results back."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from engine.config import ParallelConfig
from engine.errors import EngineFailure, ProtocolViolation, RankFailure, RemudaError
from engine.executor.blame import find_culprit, unanswered
from engine.executor.channel import ChannelClosed, LeaderChannel
from engine.executor.gang_start import GangReady, GangStart, OnMessage
from engine.executor.rank_message import decode_message
from engine.messages import RankError, Shutdown, StepPlan, StepResult, encode
from engine.model_config import ModelConfig


@dataclass
class _PendingStep:
    """A plan on its way, and the ranks' answers so far."""

    step: int
    deadline: float
    results: dict[int, StepResult] = field(default_factory=dict)
    future: "Future[list[StepResult]]" = field(default_factory=Future)


class ChannelExecutor:
    """One gang, one epoch: ``start`` first, then an Executor (see there).

    Args:
        channel: owned from now on, and closed by ``close``.
        stall_timeout_s: a start in which no rank reports anything for so long has failed. A rank that reads weights
            reports all the time.
        step_timeout_s: a step that takes longer has failed.
        on_failure: called once, from any thread, when the gang broke; also while no plan is on its way.
    """

    def __init__(
        self,
        channel: LeaderChannel,
        parallel: ParallelConfig,
        *,
        epoch: int = 0,
        stall_timeout_s: float = 600.0,
        step_timeout_s: float = 120.0,
        on_failure: Callable[[RemudaError], None] = lambda error: None,
    ) -> None:
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
        self._failure: RemudaError | None = None
        self._closing = False
        self._collector: threading.Thread | None = None

    def start(
        self,
        model: ModelConfig,
        *,
        block_size: int,
        max_model_len: int | None = None,
        on_message: OnMessage = lambda message: None,
    ) -> GangReady:
        """Waits until all ranks have loaded, sizes the cache, and waits until they are ready.

        ``max_model_len`` None: the longest that fits. Raises what a rank raised (CheckpointError, …), DoesNotFit, or
        RankFailure; ``close`` is to be called all the same.
        """
        start = GangStart(self._channel, self._num_ranks, self._epoch, self._stall_timeout_s, on_message)
        ready = start.run(model, self._num_stages, block_size, max_model_len)
        self._collector = threading.Thread(target=self._collect, name="step-results", daemon=True)
        self._collector.start()
        return ready

    def prepare(self, plan: StepPlan) -> None:
        """See Executor."""
        self._prepared = (plan, encode(plan))

    def submit(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """See Executor. Calls come one at a time."""
        assert self._collector is not None, "start comes first"
        data = self._prepared[1] if self._prepared is not None and self._prepared[0] is plan else encode(plan)
        pending = _PendingStep(plan.step, time.monotonic() + self._step_timeout_s)
        with self._lock:
            if self._failure is not None:
                pending.future.set_exception(self._failure)
                return pending.future
            self._pending.append(pending)
        try:
            self._channel.send(data)
        except RankFailure:
            pass  # the collector hears of it too, and of what the rank said before: its reason is the better one
        except (ProtocolViolation, ChannelClosed) as error:
            self._fail(error)
        return pending.future

    # ---- the collector's thread -----------------------------------------------------------------------------------

    def _collect(self) -> None:
        try:
            while True:
                self._take()
        except ChannelClosed:
            self._fail(RankFailure("the gang was closed"))
        except RemudaError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  (a defect: whatever it is, plans on their way must end)
            self._fail(ProtocolViolation(f"taking in results failed: {type(error).__name__}: {error}"))

    def _take(self) -> None:
        with self._lock:
            # A plan that is sent while this waits is not overdue before the wait is over.
            left = self._pending[0].deadline - time.monotonic() if self._pending else self._step_timeout_s
        try:
            rank, data = self._channel.receive(max(0.0, left))
        except TimeoutError:
            self._check_overdue()
            return
        message = decode_message(data, rank)
        if isinstance(message, RankError):
            raise find_culprit(self._channel, message, self._num_ranks)
        if not isinstance(message, StepResult):
            raise ProtocolViolation(f"rank {rank} sent {type(message).__name__} after its start")
        self._accept(rank, message)

    def _check_overdue(self) -> None:
        with self._lock:
            if not self._pending or time.monotonic() < self._pending[0].deadline:
                return
            oldest = self._pending[0]
        missing = [rank for rank in range(self._num_ranks) if rank not in oldest.results]
        raise unanswered(oldest.step, missing, self._step_timeout_s)

    def _accept(self, rank: int, result: StepResult) -> None:
        """Ranks answer in order, so what all have answered is always the oldest."""
        with self._lock:
            due = next((pending for pending in self._pending if rank not in pending.results), None)
            if due is None or (result.epoch, result.step) != (self._epoch, due.step):
                raise ProtocolViolation(
                    f"rank {rank} answers step {result.step} of epoch {result.epoch}; due is "
                    f"{'none' if due is None else due.step} of epoch {self._epoch}"
                )
            due.results[rank] = result
            if len(due.results) < self._num_ranks:
                return
            self._pending.popleft()
        due.future.set_result(_by_dp_group(due.results, self._sampling_ranks))

    def _fail(self, error: RemudaError) -> None:
        """Of all failures the first is kept."""
        with self._lock:
            is_news = self._failure is None and not self._closing
            self._failure = self._failure or error
            failed, self._pending = self._pending, deque()
        for pending in failed:
            pending.future.set_exception(self._failure)
        if is_news:
            self._on_failure(self._failure)

    @property
    def failure(self) -> RemudaError | None:
        """Why the gang broke, also while no plan is on its way."""
        return self._failure

    def close(self) -> None:
        """Asks the ranks to leave and cuts their connections, which those that do not listen take as the same order."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._fail(RankFailure("the gang was closed"))
        with contextlib.suppress(EngineFailure):  # a rank that is gone needs no asking
            self._channel.send(encode(Shutdown("the gang is closed")))
        self._channel.close()
        if self._collector not in (None, threading.current_thread()):  # on_failure may close, in the collector's thread
            self._collector.join()


def _by_dp_group(results: dict[int, StepResult], sampling_ranks: list[int]) -> list[StepResult]:
    """The sampling ranks' results, the first with all ranks' news of adapters."""
    groups = [results[rank] for rank in sampling_ranks]
    if any(result.adapters for result in results.values()):
        outcomes = [outcome for rank in sorted(results) for outcome in results[rank].adapters]
        groups = [msgspec.structs.replace(result, adapters=[]) for result in groups]
        groups[0] = msgspec.structs.replace(groups[0], adapters=outcomes)
    return groups
