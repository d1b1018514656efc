"""Metrics of tenants. What names a tenant, key or model is bounded; beyond it they are ``other``."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from cluster.tenants.record import UsageRecord

MAX_LABELS: Final = 500
"""Distinct tenants; and distinct (tenant, key, model)."""
OTHER: Final = "other"


class TenantMetrics:
    """Args:
    registry: where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter(
            "remuda_tenant_tokens",
            "Tokens delivered, by kind: prompt (cached ones included), cached, completion.",
            ["tenant", "key", "model_name", "kind"],
            registry=registry,
        )
        self._requests = Counter(
            "remuda_tenant_requests", "Requests by how they ended.", ["tenant", "outcome"], registry=registry
        )
        self._refusals = Counter(
            "remuda_tenant_limit_refusals", "Requests refused by a tenant's limits.", ["tenant"], registry=registry
        )
        self.store_failures = Counter(
            "remuda_limit_store_failures",
            "Times that the shared store of limits did not answer; local limits held then.",
            registry=registry,
        )
        self.lost_lines = Counter(
            "remuda_usage_log_lost_lines", "Lines of usage or audit log that could not be written.", registry=registry
        )
        self._tenants: set[str] = set()
        self._accounts: set[tuple[str, str, str]] = set()

    def used(self, record: UsageRecord) -> None:
        """Counted once for each request."""
        account = (record.tenant, record.key_id, record.model)
        if account not in self._accounts:
            if len(self._accounts) < MAX_LABELS:
                self._accounts.add(account)
            else:
                account = (self._tenant(record.tenant), OTHER, OTHER)
        for kind, amount in (
            ("prompt", record.num_prompt_tokens),
            ("cached", record.num_cached_tokens),
            ("completion", record.num_completion_tokens),
        ):
            self._tokens.labels(*account, kind).inc(amount)

    def ended(self, tenant: str, outcome: str) -> None:
        self._requests.labels(self._tenant(tenant), outcome).inc()

    def refused(self, tenant: str) -> None:
        self._refusals.labels(self._tenant(tenant)).inc()

    def _tenant(self, name: str) -> str:
        if name not in self._tenants:
            if len(self._tenants) >= MAX_LABELS:
                return OTHER
            self._tenants.add(name)
        return name
