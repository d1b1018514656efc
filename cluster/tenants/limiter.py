"""Holds requests to their tenant's limits: requests and tokens a minute, how many run at once and how many wait."""

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cluster.tenants.config import Policies, TenantPolicy
from cluster.tenants.report import LimitReport
from cluster.tenants.store import LEASE_S, LimitStore
from engine.errors import InvalidRequest, Overloaded

POLL_S = 0.1
"""How soon the first in a tenant's queue sees that a request has ended at another front end."""
QUEUE_RETRY_S = 1.0
"""What a client is told that finds the queue full: nobody knows when requests end."""
RENEW_INTERVAL_S = LEASE_S / 4
NO_BOUND = 2**31


class LimitExceeded(Overloaded):
    """A tenant has used up what it may use now."""


@dataclass(frozen=True)
class Visit:
    """One request. ``report``: for what its response says of limits. ``num_used``: tokens that it has been given, asked
    when it ends. ``may_return``: its client may come back for it, and its leaders go on meanwhile. ``comes_back``: it
    has, and was let in before.
    """

    request_id: str
    report: LimitReport
    num_used: Callable[[], int]
    may_return: bool = False
    comes_back: bool = False


class Stay:
    """One request, while it is here."""

    def __init__(self, tenant: str, policy: TenantPolicy, store: LimitStore, visit: Visit) -> None:
        self.tenant = tenant
        self._policy = policy
        self._store = store
        self._visit = visit
        self._report = visit.report
        self._num_reserved = 0

    async def take_request(self) -> None:
        """Raises LimitExceeded."""
        bound = self._policy.requests_per_minute
        if bound is None:
            return
        level = await self._store.take(self.tenant, "requests", bound, 1)
        self._report.note("requests", bound, level)
        if level.wait_s:
            raise LimitExceeded(
                f"tenant {self.tenant!r} may make {bound} requests a minute; try again in {level.wait_s:.1f} s",
                level.wait_s,
            )

    async def reserve(self, num_prompt_tokens: int, max_new_tokens: int, is_asked_for: bool) -> None:
        """What the request may use at most. Where the client did not say how long the answer may be
        (``is_asked_for``), no more than the whole bucket: what goes beyond is charged when it is known.

        Raises:
            LimitExceeded: there is not so much now.
            InvalidRequest: there never is.
        """
        bound = self._policy.tokens_per_minute
        if bound is None or self._visit.comes_back:
            return
        num_tokens = num_prompt_tokens + max_new_tokens
        if not is_asked_for and num_prompt_tokens <= bound:
            num_tokens = min(num_tokens, bound)
        if num_tokens > bound:
            raise InvalidRequest(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({max_new_tokens}) are more than the {bound} "
                f"tokens that tenant {self.tenant!r} may use in a minute; shorten one of them",
                "max_tokens",
            )
        level = await self._store.take(self.tenant, "tokens", bound, num_tokens)
        self._report.note("tokens", bound, level)
        if level.wait_s:
            raise LimitExceeded(
                f"tenant {self.tenant!r} may use {bound} tokens a minute, and this request may need {num_tokens}; "
                f"try again in {level.wait_s:.1f} s",
                level.wait_s,
            )
        self._num_reserved = num_tokens

    def cut_off(self) -> None:
        """Its client has left. If it may return, what it may yet use stays taken."""
        if self._visit.may_return:
            self._num_reserved = 0

    async def settle(self) -> None:
        """Gives back what was not used."""
        bound = self._policy.tokens_per_minute
        if bound is None or not self._num_reserved:
            return
        num_left, self._num_reserved = self._num_reserved - self._visit.num_used(), 0
        if num_left:
            await self._store.give(self.tenant, "tokens", bound, num_left)


class Limiter:
    """Args:
    policies: as they are now.
    store: of buckets and running requests.
    """

    def __init__(self, policies: Callable[[], Policies], store: LimitStore) -> None:
        self._policies = policies
        self._store = store
        self._queues: defaultdict[str, deque[asyncio.Event]] = defaultdict(deque)
        self._running: defaultdict[str, set[str]] = defaultdict(set)

    @contextlib.asynccontextmanager
    async def stay(self, tenant: str, visit: Visit) -> AsyncIterator[Stay]:
        """While a request is here. Raises LimitExceeded."""
        policy, request_id = self._policies().of(tenant), visit.request_id
        stay = Stay(tenant, policy, self._store, visit)
        max_running = policy.max_concurrent_requests
        if visit.comes_back:
            # It runs, whatever there is room for; others wait for its end.
            max_running = None if max_running is None else NO_BOUND
        else:
            await stay.take_request()
        if max_running is not None:
            try:
                await self._enter(tenant, request_id, max_running, policy.max_queued_requests)
            except asyncio.CancelledError:
                # The store may have let it in before it could say so.
                await asyncio.shield(asyncio.ensure_future(self._leave(tenant, request_id)))
                raise
        try:
            yield stay
        except (asyncio.CancelledError, GeneratorExit):
            stay.cut_off()
            raise
        finally:
            # In a task of its own: who is cancelled gives back all the same.
            await asyncio.shield(asyncio.ensure_future(self._end(stay, request_id, max_running is not None)))

    async def _end(self, stay: Stay, request_id: str, has_entered: bool) -> None:
        try:
            await stay.settle()
        finally:
            if has_entered:
                await self._leave(stay.tenant, request_id)

    async def _enter(self, tenant: str, request_id: str, max_running: int, max_queued: int) -> None:
        if not self._queues.get(tenant) and await self._try_enter(tenant, request_id, max_running):
            return
        queue = self._queues[tenant]
        if len(queue) >= max_queued:
            self._forget_if_empty(tenant)
            waits = f" and {max_queued} may wait" if max_queued else ""
            raise LimitExceeded(
                f"tenant {tenant!r} has {max_running} requests running, which is as many as it may{waits}; try later",
                QUEUE_RETRY_S,
            )
        turn = asyncio.Event()
        queue.append(turn)
        try:
            await self._wait_for_turn(tenant, request_id, max_running, turn)
        finally:
            queue.remove(turn)
            self._wake(tenant)
            self._forget_if_empty(tenant)

    async def _wait_for_turn(self, tenant: str, request_id: str, max_running: int, turn: asyncio.Event) -> None:
        queue = self._queues[tenant]
        while queue[0] is not turn or not await self._try_enter(tenant, request_id, max_running):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if queue[0] is turn else None):
                    await turn.wait()
            turn.clear()

    async def _try_enter(self, tenant: str, request_id: str, max_running: int) -> bool:
        has_entered = await self._store.enter(tenant, request_id, max_running)
        if has_entered:
            self._running[tenant].add(request_id)
        return has_entered

    async def _leave(self, tenant: str, request_id: str) -> None:
        self._running[tenant].discard(request_id)
        if not self._running[tenant]:
            del self._running[tenant]
        await self._store.leave(tenant, request_id)
        self._wake(tenant)

    def _wake(self, tenant: str) -> None:
        if queue := self._queues.get(tenant):
            queue[0].set()

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]

    async def renew(self) -> None:
        """What runs still runs; to be called every RENEW_INTERVAL_S."""
        for tenant, request_ids in list(self._running.items()):
            await self._store.renew(tenant, sorted(request_ids))
