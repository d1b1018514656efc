"""The thread that owns a replica's engine.

Everything else talks to the engine through this object: requests and aborts wait in an inbox that is emptied whenever a
plan can leave, and what a step gave goes out in one call. The thread sleeps while there is nothing to do.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import Draining, Unavailable
from cluster.types import ReplicaState
from engine.engine import EngineStats
from engine.errors import EngineFailure, InvalidRequest, Overloaded, RemudaError
from engine.outputs import Outputs
from engine.request import AdapterInfo, Output, Request
from engine.scheduler.expert_stats import ExpertStats

_log = logging.getLogger(__name__)

MAX_INBOX = 4096
"""Requests and aborts that may wait for the end of one step."""


class Engine(Protocol):
    """What the loop needs of engine.engine.Engine. Not thread-safe: only the loop's thread calls it."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self, news: Callable[[], None]) -> Sequence[Output]: ...
    def stats(self) -> EngineStats: ...
    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]": ...
    def unload_adapter(self, name: str) -> "Future[None]": ...
    @property
    def adapters(self) -> tuple[AdapterInfo, ...]: ...


@dataclass(frozen=True)
class StepOutputs:
    """What one turn of the loop gave. ``errors`` are (request id, why): refused or failed, and so ended.

    ``failure``: the engine broke; this is the last that comes, and ``errors`` names every request that was live.
    """

    outputs: Outputs
    errors: list[tuple[str, RemudaError]]
    failure: EngineFailure | None = None


@dataclass(frozen=True)
class Load:
    """The loop's gauges at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    experts: ExpertStats | None = None
    progress_age_s: float = 0.0
    """While there is work: seconds since a step last finished. 0 when idle."""


@dataclass(frozen=True, eq=False)
class _AdapterChange:
    """``begin`` asks the engine for it, which says with a future of its own when it is done; ``future`` is for whoever
    waits in another thread."""

    begin: Callable[[Engine], "Future[Any]"]
    future: "Future[Any]" = field(default_factory=Future)


class EngineLoop:
    """Runs an engine in a thread of its own.

    Every request that ``submit`` took ends exactly once: with an output that has a finish reason, with an entry in
    ``errors``, or by ``abort``, after which nothing more need come.

    Args:
        engine: owned by this object from now on.
        clock: seconds, monotonic.
        repair: called, in the loop's thread, when the engine broke. When it returns, the engine has been reset and goes
            on with all that was live; requests that come meanwhile wait in the inbox. Raises EngineFailure where the
            engine has failed for good. None: it has, whatever broke.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
        repair: Callable[[EngineFailure], None] | None = None,
    ) -> None:
        self._engine = engine
        self._repair = repair
        self._clock = clock
        self._wake = threading.Condition()
        self._inbox: deque[Request | str | _AdapterChange] = deque()
        """Filled by other threads. An entry is a request to add, the id of one to abort, or a change of adapters."""
        self._taken: deque[Request | str | _AdapterChange] = deque()
        """What the engine has yet to see of the inbox. Empty between turns."""
        self._refused: list[tuple[str, RemudaError]] = []
        self._live: set[str] = set()
        self._begun: list[tuple[Future[Any], _AdapterChange]] = []
        """Changes of adapters that the engine has taken, each with the engine's own future."""
        self._adapters: tuple[AdapterInfo, ...] = ()
        self._state = ReplicaState.STARTING
        self._stopping = False
        self._broken: tuple[RemudaError, Callable[[], bool]] | None = None
        self._failure: EngineFailure | None = None
        self._thread: threading.Thread | None = None
        self._publish: Callable[[StepOutputs], None] = _discard
        self._num_steps = 0
        self._is_busy = False
        self._last_progress_s = clock()
        self._stats: EngineStats | None = None

    def start(self, publish: Callable[[StepOutputs], None]) -> None:
        """Starts the thread, which calls ``publish`` once per turn that gave anything. It must not block or raise."""
        assert self._thread is None, "an engine loop starts once"
        self._publish = publish
        self._stats = self._engine.stats()
        self._adapters = self._engine.adapters
        self._state = ReplicaState.READY
        self._launch()

    def _launch(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    @property
    def state(self) -> ReplicaState:
        return self._state

    @property
    def failure(self) -> EngineFailure | None:
        """Why the state is FAILED."""
        return self._failure

    def load(self) -> Load:
        """From any thread; at most one step old."""
        stats = self._stats
        with self._wake:
            num_inbox = sum(1 for item in self._inbox if isinstance(item, Request))
        return Load(
            num_running=stats.num_running if stats is not None else 0,
            num_waiting=(stats.num_waiting if stats is not None else 0) + num_inbox,
            kv_cache_usage=stats.kv_usage if stats is not None else 0.0,
            num_steps=self._num_steps,
            experts=stats.experts if stats is not None else None,
            progress_age_s=self._clock() - self._last_progress_s if self._is_busy else 0.0,
        )

    def submit(self, request: Request) -> None:
        """From any thread. The engine sees the request before its next step; a refusal comes through ``publish``.

        Raises:
            Draining, Unavailable: the replica takes no requests (any more).
            Overloaded: MAX_INBOX entries wait already.
        """
        with self._wake:
            self._check_accepting()
            if len(self._inbox) >= MAX_INBOX:
                raise Overloaded(f"{MAX_INBOX} requests and cancellations wait for the running step already")
            self._inbox.append(request)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """From any thread. An id that is not live (any more) is ignored."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        """From any thread, as engine.engine.Engine has it; whatever goes wrong, the future says it."""
        return self._change(lambda engine: engine.load_adapter(name, path))

    def unload_adapter(self, name: str) -> "Future[None]":
        """From any thread, as engine.engine.Engine has it; whatever goes wrong, the future says it."""
        return self._change(lambda engine: engine.unload_adapter(name))

    def _change(self, begin: Callable[[Engine], "Future[Any]"]) -> "Future[Any]":
        change = _AdapterChange(begin)
        # Nobody can cancel it from now on: the engine's thread will end it.
        change.future.set_running_or_notify_cancel()
        with self._wake:
            try:
                self._check_accepting()
            except Unavailable as error:
                change.future.set_exception(error)
            else:
                self._inbox.append(change)
                self._wake.notify()
        return change.future

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Those that requests can name; at most one step old."""
        return self._adapters

    def drain(self) -> None:
        """Refuses new requests from now on; what runs may finish."""
        with self._wake:
            if self._state.takes_requests:
                self._state = ReplicaState.DRAINING

    def fail(self, error: RemudaError, still_holds: Callable[[], bool] = lambda: True) -> None:
        """From any thread: the gang broke, maybe while no step was under way. ``still_holds``: asked by the loop's
        thread when it takes notice; there may have been a repair in between."""
        with self._wake:
            self._broken = error, still_holds
            self._wake.notify()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the running step; live requests end with Unavailable. False: the step did not end."""
        self.drain()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _check_accepting(self) -> None:
        if self._state is ReplicaState.FAILED:
            raise Unavailable(f"this replica failed: {self._failure}")
        if self._state is ReplicaState.DRAINING:
            raise Draining("this replica is draining; another one has to take new requests")
        if self._state is ReplicaState.STARTING:
            raise Unavailable("this replica is starting")

    def _run(self) -> None:
        failure: RemudaError = Unavailable("this replica was stopped")
        try:
            while self._turn_or_repair():
                pass
        except EngineFailure as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (a defect: whatever it is, every request must still end)
            _log.exception("the engine raised what it should not")
            failure = EngineFailure(f"the engine raised {type(error).__name__}: {error}")
        self._end(failure)

    def _turn_or_repair(self) -> bool:
        try:
            return self._turn()
        except EngineFailure as error:
            if self._repair is None or self._stopping:
                raise
            _log.warning("the engine broke and is to be repaired: %s", error)
            broken = error
        self._begin_repair()
        self._repair(broken)
        self._end_repair()
        return True

    def _begin_repair(self) -> None:
        with self._wake:
            self._is_busy = False  # what is live waits for the repair, not for a step
            if self._state is ReplicaState.READY:
                self._state = ReplicaState.REPAIRING

    def _end_repair(self) -> None:
        with self._wake:
            if self._state is ReplicaState.REPAIRING:  # and not draining meanwhile
                self._state = ReplicaState.READY

    def _turn(self) -> bool:
        """Waits for work, takes in what came, runs one step. False: time to stop."""
        with self._wake:
            while self._has_nothing_to_do:
                self._is_busy = False
                self._wake.wait()
            if self._stopping:
                return False
            broken, self._broken = self._broken, None
            if broken is not None and broken[1]():
                raise broken[0]
            if not self._is_busy:
                self._is_busy, self._last_progress_s = True, self._clock()
        self._take_in()
        outputs = Outputs()
        if self._engine.has_work:
            given = self._engine.step(self._take_in)
            outputs = given if isinstance(given, Outputs) else Outputs(given)
            self._num_steps += 1
            self._last_progress_s = self._clock()
            for output in outputs.others:
                if output.finish_reason is not None:
                    self._live.discard(output.request_id)
        self._stats = self._engine.stats()
        self._end_changes()
        errors, self._refused = self._refused, []
        if outputs or errors:
            self._publish(StepOutputs(outputs, errors))
        return True

    @property
    def _has_nothing_to_do(self) -> bool:
        return not (self._inbox or self._stopping or self._broken or self._engine.has_work)

    def _take_in(self) -> None:
        """Hands requests and aborts to the engine, in order, and notes those that it refuses."""
        if not self._inbox:
            return  # whatever comes now is in time for the next turn
        with self._wake:
            self._taken, self._inbox = self._inbox, self._taken
        while self._taken:
            item = self._taken.popleft()
            if isinstance(item, str):
                if item in self._live:
                    self._live.remove(item)
                    self._engine.abort(item)
                continue
            if isinstance(item, _AdapterChange):
                self._begin_change(item)
                continue
            request_id = item.request_id
            if request_id in self._live:
                self._refused.append((request_id, InvalidRequest(f"request {request_id} is running already")))
                continue
            self._live.add(request_id)
            try:
                self._engine.add(item)
            except RemudaError as error:
                self._live.remove(request_id)
                self._refused.append((request_id, error))

    def _begin_change(self, change: _AdapterChange) -> None:
        try:
            self._begun.append((change.begin(self._engine), change))
        except RemudaError as error:
            change.future.set_exception(error)

    def _end_changes(self) -> None:
        """Tells whoever waits for changes of adapters that have ended."""
        self._adapters = self._engine.adapters
        ended = [(done, change) for done, change in self._begun if done.done()]
        self._begun = [(done, change) for done, change in self._begun if not done.done()]
        for done, change in ended:
            if (error := done.exception()) is not None:
                change.future.set_exception(error)
            else:
                change.future.set_result(done.result())

    def _end(self, failure: RemudaError) -> None:
        """Ends every live and every waiting request with ``failure``."""
        with self._wake:
            if isinstance(failure, EngineFailure):
                self._failure = failure
                self._state = ReplicaState.FAILED
            waiting = [*self._taken, *self._inbox]
            self._inbox.clear()
            self._is_busy = False
        aborted = {item for item in waiting if isinstance(item, str)}
        ended = [*self._live, *(item.request_id for item in waiting if isinstance(item, Request))]
        errors = self._refused + [(request_id, failure) for request_id in ended if request_id not in aborted]
        self._live.clear()
        for change in [*(change for _, change in self._begun), *waiting]:
            if isinstance(change, _AdapterChange):
                change.future.set_exception(failure)
        self._begun.clear()
        if errors or self._failure is not None:
            self._publish(StepOutputs(Outputs(), errors, self._failure))


def _discard(outputs: StepOutputs) -> None:
    raise AssertionError("the loop published before it was started")
