"""What holds while Redis is away: this front end's own limits.

Fail open, to local limits: a request that could have been computed is not refused because a counter is out of reach, as
gateways' rate limiters do by default. Nobody is unlimited meanwhile: each front end holds every bound by itself, so
that at most as many times as much passes as there are front ends.
"""

import logging
from collections.abc import Awaitable, Callable

from cluster.tenants.store import Kind, Level, LimitStore, StoreUnavailable

RETRY_S = 1.0
"""So long after a failure nobody asks the shared store, so that not every request waits for its timeout."""

_log = logging.getLogger(__name__)


class FallbackStore:
    """Implements LimitStore: ``shared`` while it answers, else ``local``.

    Args:
        now_s: a clock that does not go back.
        failed: called for each failure.
    """

    def __init__(
        self, shared: LimitStore, local: LimitStore, now_s: Callable[[], float], failed: Callable[[], None]
    ) -> None:
        self._shared = shared
        self._local = local
        self._now_s = now_s
        self._failed = failed
        self._retry_at_s = float("-inf")
        self._is_away = False

    @property
    def is_shared(self) -> bool:
        """Whether the shared store answered when it was last asked."""
        return not self._is_away

    async def _ask(
        self, shared: Callable[[], Awaitable[Level | bool | None]], local: Callable[[], Awaitable[Level | bool | None]]
    ) -> Level | bool | None:
        if self._now_s() >= self._retry_at_s:
            try:
                answer = await shared()
            except StoreUnavailable as error:
                self._failed()
                self._retry_at_s = self._now_s() + RETRY_S
                if not self._is_away:
                    _log.warning("the limits' store is away; each front end holds the limits by itself: %s", error)
                self._is_away = True
            else:
                if self._is_away:
                    _log.warning("the limits' store is back")
                self._is_away = False
                return answer
        return await local()

    async def take(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> Level:
        answer = await self._ask(
            lambda: self._shared.take(tenant, kind, per_minute, amount),
            lambda: self._local.take(tenant, kind, per_minute, amount),
        )
        assert isinstance(answer, Level)
        return answer

    async def give(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> None:
        await self._ask(
            lambda: self._shared.give(tenant, kind, per_minute, amount),
            lambda: self._local.give(tenant, kind, per_minute, amount),
        )

    async def enter(self, tenant: str, request_id: str, max_running: int) -> bool:
        return bool(
            await self._ask(
                lambda: self._shared.enter(tenant, request_id, max_running),
                lambda: self._local.enter(tenant, request_id, max_running),
            )
        )

    async def leave(self, tenant: str, request_id: str) -> None:
        """From both: it may have entered the other one."""
        await self._local.leave(tenant, request_id)
        await self._ask(lambda: self._shared.leave(tenant, request_id), _nothing)

    async def renew(self, tenant: str, request_ids: list[str]) -> None:
        await self._ask(lambda: self._shared.renew(tenant, request_ids), _nothing)


async def _nothing() -> None:
    """What the local store need not do."""
