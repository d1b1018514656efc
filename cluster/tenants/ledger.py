"""Counts what requests used: each once, by its id, when it has ended."""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from cluster.errors import Unavailable
from cluster.tenants.line_log import LineLog
from cluster.tenants.metrics import TenantMetrics
from cluster.tenants.record import UsageRecord, UsageTotal
from cluster.tenants.store import StoreUnavailable
from cluster.tenants.usage_store import UsageStore

RETURN_S: Final = 45.0
"""A client that may come back has so long: a leader keeps its request for 30 s. Its request is counted after it."""
MAX_WAITING: Final = 100_000
"""Records that wait for the shared store; beyond it they are counted here alone."""
MAX_REMEMBERED: Final = 100_000
"""Requests that are known to be counted, the latest."""

_log = logging.getLogger(__name__)


class UsageLedger:
    """Args:
    store: where usage adds up.
    metrics: the same, by front end.
    log: one line for each counted request.
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
        self._cut_off: OrderedDict[str, tuple[UsageRecord, float]] = OrderedDict()
        """Requests whose clients may come back, and until when."""
        self._waiting: deque[UsageRecord] = deque()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._flushing: set[asyncio.Task[None]] = set()

    async def came_back(self, request_id: str) -> None:
        """Its client goes on with it here; it is counted from its beginning when it has ended here."""
        self._cut_off.pop(request_id, None)
        try:
            await self._store.claim(request_id, self._owner)
        except StoreUnavailable as error:
            _log.warning("request %s may be counted twice: the shared store is away: %s", request_id, error)

    def ended(self, record: UsageRecord, may_return: bool = False) -> None:
        """``may_return``: its client was cut off and may come back, here or to another front end."""
        if may_return:
            self._cut_off[record.request_id] = (record, self._now_s() + RETURN_S)
        elif record.has_used:
            self._queue(record)
            task = asyncio.get_running_loop().create_task(self._flush())
            self._flushing.add(task)
            task.add_done_callback(self._flushing.discard)

    def _queue(self, record: UsageRecord) -> None:
        if record.request_id in self._seen:
            return
        self._seen[record.request_id] = None
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        self._waiting.append(record)

    async def poll(self) -> None:
        """To be called every second or so."""
        self._release(self._now_s())
        await self._flush()

    def _release(self, now_s: float) -> None:
        while self._cut_off and next(iter(self._cut_off.values()))[1] <= now_s:
            _, (record, _) = self._cut_off.popitem(last=False)
            if record.has_used:
                self._queue(record)

    async def _flush(self) -> None:
        async with self._lock:
            while self._waiting:
                record = self._waiting[0]
                try:
                    is_ours = await self._store.count(record, self._owner)
                except StoreUnavailable:
                    if len(self._waiting) <= MAX_WAITING:
                        return
                    is_ours = True
                self._waiting.popleft()
                if is_ours:
                    self._note(record)

    def _note(self, record: UsageRecord) -> None:
        self._metrics.used(record)
        if self._log is not None:
            self._log.write(record)

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
            self._note(self._waiting.popleft())
