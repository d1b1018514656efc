"""Limits of one front end, in its memory."""

from collections import defaultdict
from collections.abc import Callable

from cluster.tenants.store import Kind, Level
from cluster.tenants.token_bucket import TokenBucket

MAX_IDLE_BUCKETS = 10_000
"""Tenants may be as many as an identity provider names. Full buckets are forgotten first; they come back full."""


class MemoryStore:
    """Implements LimitStore. ``now_s``: a clock that does not go back."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._buckets: dict[tuple[str, Kind], TokenBucket] = {}
        self._running: defaultdict[str, set[str]] = defaultdict(set)

    def _bucket(self, tenant: str, kind: Kind, per_minute: int) -> TokenBucket:
        now_s = self._now_s()
        bucket = self._buckets.get((tenant, kind))
        if bucket is None:
            if len(self._buckets) >= MAX_IDLE_BUCKETS:
                self._buckets = {key: each for key, each in self._buckets.items() if each.reset_s(now_s) > 0}
            bucket = self._buckets[tenant, kind] = TokenBucket(per_minute, now_s)
        bucket.resize(per_minute, now_s)
        return bucket

    async def take(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> Level:
        bucket = self._bucket(tenant, kind, per_minute)
        now_s = self._now_s()
        wait_s = bucket.take(amount, now_s)
        return Level(wait_s, max(0, int(bucket.level(now_s))), bucket.reset_s(now_s))

    async def give(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> None:
        self._bucket(tenant, kind, per_minute).give(amount, self._now_s())

    async def enter(self, tenant: str, request_id: str, max_running: int) -> bool:
        if len(self._running[tenant]) >= max_running:
            return False
        self._running[tenant].add(request_id)
        return True

    async def leave(self, tenant: str, request_id: str) -> None:
        self._running[tenant].discard(request_id)
        if not self._running[tenant]:
            del self._running[tenant]

    async def renew(self, tenant: str, request_ids: list[str]) -> None:
        """Its requests end with the process that has them."""
