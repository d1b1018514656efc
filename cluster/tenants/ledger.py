"""Counts what requests used: every token once, by the request's id, whoever its client came back to."""

import asyncio
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cluster.errors import Unavailable
from cluster.tenants.line_log import LineLog
from cluster.tenants.metrics import TenantMetrics
from cluster.tenants.record import NOTHING, Amounts, UsageRecord, UsageTotal, most
from cluster.tenants.store import StoreUnavailable
from cluster.tenants.usage_store import Counted, UsageStore

RETURN_S: Final = 45.0
"""A client that may come back has so long: a leader keeps its request for 30 s. Its request is counted after it."""
MAX_WAITING: Final = 100_000
"""Records that wait for the shared store; beyond it they are counted here alone."""

_log = logging.getLogger(__name__)


@dataclass
class _Back:
    """A request whose client has come back to this front end. ``num_visits``: connections over which it did and that
    have not ended. ``given``: what earlier ones were given, which the last one may not have been."""

    num_visits: int = 0
    given: Amounts = NOTHING


class UsageLedger:
    """Args:
    store: where usage adds up.
    metrics: the same, by front end.
    log: a line for each counted request.
    owner: this front end's name; the store knows by it who counts a request that went from one to another.
    now_s: a clock that does not go back.
    """

    def __init__(
        self, store: UsageStore, metrics: TenantMetrics, log: LineLog | None, owner: str, now_s: Callable[[], float]
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._log = log
        self._owner = owner
        self._now_s = now_s
        self._back: dict[str, _Back] = {}
        self._cut_off: OrderedDict[str, tuple[UsageRecord, float]] = OrderedDict()
        """Requests whose clients may come back, and until when."""
        self._waiting: deque[tuple[UsageRecord, str]] = deque()
        """With the names that the store knows the entries by."""
        self._lock = asyncio.Lock()
        self._flushing: set[asyncio.Task[None]] = set()

    async def came_back(self, request_id: str) -> None:
        """Its client goes on with it here; it is counted from its beginning when it has ended here."""
        back = self._back.setdefault(request_id, _Back())
        back.num_visits += 1
        back.given = most(back.given, self._take_cut_off(request_id))
        try:
            await self._store.claim(request_id, self._owner)
        except StoreUnavailable as error:
            _log.warning("request %s may be counted in two parts: the shared store is away: %s", request_id, error)

    def ended(
        self, record: UsageRecord, may_return: bool = False, is_taken_over: bool = False, came_back: bool = False
    ) -> None:
        """One connection's part in a request has ended.

        Args:
            record: with what it was given, from the request's beginning.
            may_return: its client was cut off and may come back, here or to another front end.
            is_taken_over: another connection, here or there, goes on with the request and counts it.
            came_back: it went on with what another connection began.
        """
        request_id = record.request_id
        back = self._back.get(request_id)
        if back is None:
            if not record.has_used:
                return
        else:
            back.num_visits -= came_back
            if back.num_visits and is_taken_over:
                back.given = most(back.given, record.amounts)
                return
            if not back.num_visits:
                del self._back[request_id]
            # Also where nothing was given: the store waits to hear what became of a request that was claimed.
            record = record.with_amounts(most(record.amounts, back.given))
        if is_taken_over and not self._store.is_shared and request_id not in self._cut_off:
            return
        record = record.with_amounts(most(record.amounts, self._take_cut_off(request_id)))
        if may_return or is_taken_over:
            self._cut_off[request_id] = (record, self._now_s() + RETURN_S)
            return
        self._queue(record)
        task = asyncio.get_running_loop().create_task(self._flush())
        self._flushing.add(task)
        task.add_done_callback(self._flushing.discard)

    def _take_cut_off(self, request_id: str) -> Amounts:
        """What a connection was given that was cut off here."""
        found = self._cut_off.pop(request_id, None)
        return NOTHING if found is None else found[0].amounts

    def _queue(self, record: UsageRecord) -> None:
        self._waiting.append((record, uuid.uuid4().hex))

    async def poll(self) -> None:
        """To be called every second or so."""
        self._release(self._now_s())
        await self._flush()

    def _release(self, now_s: float) -> None:
        while self._cut_off and next(iter(self._cut_off.values()))[1] <= now_s:
            _, (record, _) = self._cut_off.popitem(last=False)
            self._queue(record)

    async def _flush(self) -> None:
        async with self._lock:
            while self._waiting:
                record, entry = self._waiting[0]
                try:
                    counted = await self._store.count(record, self._owner, entry)
                except StoreUnavailable:
                    if len(self._waiting) <= MAX_WAITING:
                        return
                    counted = Counted(record.amounts, record.amounts)
                self._waiting.popleft()
                if counted is not None:
                    self._note(record, counted)

    def _note(self, record: UsageRecord, counted: Counted) -> None:
        """Metrics add up; of the log's lines of one request the one with most tokens is right."""
        self._metrics.used(record.with_amounts(counted.new))
        if self._log is not None:
            self._log.write(record.with_amounts(counted.whole))

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        """Raises Unavailable."""
        await self._flush()
        try:
            return await self._store.totals(tenant, days)
        except StoreUnavailable as error:
            raise Unavailable("usage is kept in a store that does not answer; try again") from error

    async def close(self) -> None:
        """Counts what is left; without the store, in the log alone."""
        self._release(float("inf"))
        await self._flush()
        while self._waiting:
            record, _ = self._waiting.popleft()
            if record.has_used:
                self._note(record, Counted(record.amounts, record.amounts))
