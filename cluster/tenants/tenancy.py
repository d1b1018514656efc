"""Tenants, as the front end sees them: what they may do, how much of it, and what they used."""

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from cluster.errors import PermissionDenied
from cluster.identity.principal import ADMIN, Principal
from cluster.identity.reloaded import Reloaded, read_file
from cluster.tenants.audit import AuditLog
from cluster.tenants.config import NO_POLICIES, Policies, load_policies
from cluster.tenants.fallback_store import FallbackStore
from cluster.tenants.ledger import UsageLedger
from cluster.tenants.limiter import RENEW_INTERVAL_S, Limiter, LimitExceeded, Stay, Visit
from cluster.tenants.line_log import LineLog
from cluster.tenants.memory_store import MemoryStore
from cluster.tenants.metrics import TenantMetrics
from cluster.tenants.record import UsageRecord, UsageTotal
from cluster.tenants.redis_store import RedisStore, connect
from cluster.tenants.store import LimitStore
from cluster.tenants.usage_store import MemoryUsage, RedisUsage, UsageStore
from engine.errors import InvalidOption
from engine.request import Tenant


@dataclass(frozen=True)
class TenancyConfig:
    """``tenants_file``: what each may do; None: everything. ``limits_store``: address of the Redis where several front
    ends keep limits and usage together; None: each by itself. Logs: files, None: none.
    """

    tenants_file: Path | None = None
    limits_store: str | None = None
    limits_store_password_file: Path | None = None
    usage_log: Path | None = None
    audit_log: Path | None = None


class Tenancy:
    """Args:
    config: files and the store.
    registry: for metrics.
    now_s: a clock that does not go back.

    Raises:
        InvalidOption: a file that cannot be used, or an address that is none.
    """

    def __init__(
        self,
        config: TenancyConfig = TenancyConfig(),
        registry: CollectorRegistry | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now_s = now_s
        self._metrics = TenantMetrics(registry or CollectorRegistry())
        self._file: Reloaded[Policies] | None = None
        if config.tenants_file is not None:
            self._file = load_policies(config.tenants_file)
        limits: LimitStore = MemoryStore(now_s)
        usage: UsageStore = MemoryUsage()
        self._redis: Redis | None = None
        if config.limits_store is not None:
            self._redis = _connect(config.limits_store, config.limits_store_password_file)
            limits = FallbackStore(RedisStore(self._redis), limits, now_s, self._metrics.store_failures.inc)
            usage = RedisUsage(self._redis)
        lost = self._metrics.lost_lines.inc
        self.audit = AuditLog(config.audit_log, lost)
        self._usage_log = None if config.usage_log is None else LineLog(config.usage_log, lost)
        owner = uuid.uuid4().hex
        self.ledger = UsageLedger(usage, self._metrics, self._usage_log, owner, now_s)
        self._limiter = Limiter(lambda: self.policies, limits)
        self._renewed_s = now_s()

    @property
    def policies(self) -> Policies:
        return NO_POLICIES if self._file is None else self._file.value

    def may_use(self, principal: Principal, model: str) -> bool:
        """``model``: its full name."""
        models = self.policies.of(principal.tenant).models
        return models is None or model in models

    def check_model(self, principal: Principal, model: str) -> None:
        """Raises PermissionDenied."""
        if not self.may_use(principal, model):
            raise PermissionDenied(f"tenant {principal.tenant!r} may not use the model {model!r}")

    def engine_tenant(self, principal: Principal) -> Tenant:
        """As its requests carry it to the scheduler."""
        return self.policies.engine_tenant(principal.tenant)

    def cache_salt(self, principal: Principal, given: str) -> str:
        """What its requests' prefixes are cached under; ``given``: the request's own. Where nobody proves who he is
        there is nobody to keep apart."""
        return given if principal.kind == "anonymous" else self.policies.cache_salt(principal.tenant, given)

    @contextlib.asynccontextmanager
    async def stay(self, principal: Principal, visit: Visit) -> AsyncIterator[Stay]:
        """While a request is here. Raises LimitExceeded."""
        try:
            async with self._limiter.stay(principal.tenant, visit) as stay:
                if visit.comes_back:
                    await self.ledger.came_back(visit.request_id)
                yield stay
        except LimitExceeded:
            self._metrics.refused(principal.tenant)
            raise

    def ended(
        self, record: UsageRecord, may_return: bool = False, is_taken_over: bool = False, came_back: bool = False
    ) -> None:
        """One call of the model has ended, or one connection's part in it, as ``UsageLedger.ended`` says."""
        self._metrics.ended(record.tenant, record.outcome)
        self.ledger.ended(record, may_return, is_taken_over, came_back)

    async def usage(self, principal: Principal, tenant: str | None, days: Sequence[str] | None) -> list[UsageTotal]:
        """Of the caller's own tenant; with the scope ``admin``, of any, and of all where none is named.

        Raises PermissionDenied, Unavailable.
        """
        if ADMIN not in principal.scopes:
            if tenant is not None and tenant != principal.tenant:
                raise PermissionDenied("usage of another tenant is for credentials with the scope 'admin'")
            tenant = principal.tenant
        return await self.ledger.totals(tenant, None if days is None else list(days))

    def poll_file(self) -> None:
        """Reads the tenants file again if it has changed. Blocks on the file system."""
        if self._file is not None:
            self._file.poll()

    async def poll(self) -> None:
        """What is due; to be called every second."""
        await self.ledger.poll()
        if self._now_s() - self._renewed_s >= RENEW_INTERVAL_S:
            self._renewed_s = self._now_s()
            await self._limiter.renew()

    async def close(self) -> None:
        """When no request is left."""
        await self.ledger.close()
        self.audit.close()
        if self._usage_log is not None:
            self._usage_log.close()
        if self._redis is not None:
            await self._redis.aclose()


def _connect(url: str, password_file: Path | None) -> Redis:
    if urlsplit(url).password is not None:
        raise InvalidOption("--limits-store holds a password, which others can see; use --limits-store-password-file")
    password = None
    if password_file is not None:
        password = read_file(password_file, "--limits-store-password-file").decode().strip()
    try:
        return connect(url, password)
    except ValueError as error:
        raise InvalidOption(f"--limits-store {url}: {error}; write redis://HOST:PORT/NUMBER or rediss://…") from error
