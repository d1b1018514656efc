"""Holds requests to their tenant's limits: requests and tokens a minute, how many run at once and how many wait."""

import asyncio
import contextlib
import uuid
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cluster.errors import Draining, TakenOver
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
MAX_EXTRAS = 10_000
"""Requests whose clients may come back, and that have paid for more than they had reserved."""


class LimitExceeded(Overloaded):
    """A tenant has used up what it may use now."""


@dataclass(frozen=True)
class Visit:
    """One request. ``report``: for what its response says of limits. ``num_used``: tokens that it has been given from
    its beginning, asked when it ends. ``may_return``: its client may come back for it, and its leaders go on
    meanwhile. ``comes_back``: it has, and was let in before.
    """

    request_id: str
    report: LimitReport
    num_used: Callable[[], int]
    may_return: bool = False
    comes_back: bool = False


class _Extras:
    """What resumable requests have paid beyond their reservations, in tokens. The oldest are forgotten."""

    def __init__(self) -> None:
        self._num_tokens: OrderedDict[str, int] = OrderedDict()

    def of(self, request_id: str) -> int:
        return self._num_tokens.get(request_id, 0)

    def add(self, request_id: str, num_tokens: int) -> None:
        self._num_tokens[request_id] = self.of(request_id) + num_tokens
        if len(self._num_tokens) > MAX_EXTRAS:
            self._num_tokens.popitem(last=False)


class Stay:
    """One request, while it is here."""

    def __init__(self, tenant: str, policy: TenantPolicy, store: LimitStore, visit: Visit, extras: _Extras) -> None:
        self.tenant = tenant
        self._policy = policy
        self._store = store
        self._visit = visit
        self._extras = extras
        self._report = visit.report
        self._num_reserved = 0
        self._keeps_rest = visit.comes_back
        """What was reserved and is not used stays taken: it may be used by a later visit, or was given back by one."""

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
        if bound is None:
            return
        num_tokens = num_prompt_tokens + max_new_tokens
        if not is_asked_for and num_prompt_tokens <= bound:
            num_tokens = min(num_tokens, bound)
        if self._visit.comes_back:
            # Its first visit has taken it.
            self._num_reserved = num_tokens
            return
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
        """Its client is not served here any more. If others may read on, what it may yet use stays taken."""
        self._keeps_rest |= self._visit.may_return

    async def settle(self) -> None:
        """Gives back what was not used, and takes what was used beyond the reservation: once, however often its client
        came back."""
        bound, visit = self._policy.tokens_per_minute, self._visit
        if bound is None or not self._num_reserved:
            return
        num_paid = self._num_reserved + (self._extras.of(visit.request_id) if visit.may_return else 0)
        num_left = num_paid - visit.num_used()
        if num_left < 0 and visit.may_return:
            self._extras.add(visit.request_id, -num_left)
        if self._keeps_rest:
            num_left = min(num_left, 0)
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
        """Places, by tenant: one for each visit, so that of two connections that read one request each has its own."""
        self._extras = _Extras()

    @contextlib.asynccontextmanager
    async def stay(self, tenant: str, visit: Visit) -> AsyncIterator[Stay]:
        """While a request is here. Raises LimitExceeded."""
        policy, place = self._policies().of(tenant), f"{visit.request_id}:{uuid.uuid4().hex}"
        stay = Stay(tenant, policy, self._store, visit, self._extras)
        await stay.take_request()
        max_running = policy.max_concurrent_requests
        if max_running is not None:
            try:
                if visit.comes_back:
                    # It runs, whatever there is room for; others wait for its end.
                    await self._try_enter(tenant, place, NO_BOUND)
                else:
                    await self._enter(tenant, place, max_running, policy.max_queued_requests)
            except asyncio.CancelledError:
                # The store may have let it in before it could say so.
                await asyncio.shield(asyncio.ensure_future(self._leave(tenant, place)))
                raise
        try:
            yield stay
        except (asyncio.CancelledError, GeneratorExit, TakenOver, Draining):
            stay.cut_off()
            raise
        finally:
            # In a task of its own: who is cancelled gives back all the same.
            await asyncio.shield(asyncio.ensure_future(self._end(stay, place, max_running is not None)))

    async def _end(self, stay: Stay, place: str, has_entered: bool) -> None:
        try:
            await stay.settle()
        finally:
            if has_entered:
                await self._leave(stay.tenant, place)

    async def _enter(self, tenant: str, place: str, max_running: int, max_queued: int) -> None:
        if not self._queues.get(tenant) and await self._try_enter(tenant, place, max_running):
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
            await self._wait_for_turn(tenant, place, max_running, turn)
        finally:
            queue.remove(turn)
            self._wake(tenant)
            self._forget_if_empty(tenant)

    async def _wait_for_turn(self, tenant: str, place: str, max_running: int, turn: asyncio.Event) -> None:
        queue = self._queues[tenant]
        while queue[0] is not turn or not await self._try_enter(tenant, place, max_running):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if queue[0] is turn else None):
                    await turn.wait()
            turn.clear()

    async def _try_enter(self, tenant: str, place: str, max_running: int) -> bool:
        has_entered = await self._store.enter(tenant, place, max_running)
        if has_entered:
            self._running[tenant].add(place)
        return has_entered

    async def _leave(self, tenant: str, place: str) -> None:
        self._running[tenant].discard(place)
        if not self._running[tenant]:
            del self._running[tenant]
        await self._store.leave(tenant, place)
        self._wake(tenant)

    def _wake(self, tenant: str) -> None:
        if queue := self._queues.get(tenant):
            queue[0].set()

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]

    async def renew(self) -> None:
        """What runs still runs; to be called every RENEW_INTERVAL_S."""
        for tenant, places in list(self._running.items()):
            renewed = sorted(places)
            await self._store.renew(tenant, renewed)
            # Who left meanwhile may have been put back.
            for place in set(renewed).difference(self._running.get(tenant, ())):
                await self._store.leave(tenant, place)
