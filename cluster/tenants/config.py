"""What each tenant may do: ``--tenants FILE``, YAML or JSON, read again when it changes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.identity.reloaded import Reloaded, read_file
from engine.errors import InvalidOption
from engine.request import MAX_TENANT_CHARS, MAX_TENANT_PRIORITY, MAX_TENANT_WEIGHT, MIN_TENANT_WEIGHT, Tenant

Count = Annotated[int, Field(ge=1, le=10**12)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_TENANT_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]


class TenantPolicy(BaseModel):
    """One tenant's. None is no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    """Prompt and generated tokens."""
    max_concurrent_requests: Count | None = None
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 0
    """That wait at one front end while as many as allowed run."""
    models: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = None
    """Models and adapters that it may name; None: all."""
    weight: Annotated[float, Field(ge=MIN_TENANT_WEIGHT, le=MAX_TENANT_WEIGHT, strict=False)] = 1.0
    priority: Annotated[int, Field(ge=-MAX_TENANT_PRIORITY, le=MAX_TENANT_PRIORITY)] = 0
    """Of the tenant: those of a lower number are served first."""
    cache_group: Name | None = None
    """Tenants of one group share the prefix cache; None: it is alone."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    default: TenantPolicy = TenantPolicy()
    """Of every tenant that is not named."""
    tenants: dict[Name, TenantPolicy] = {}


@dataclass(frozen=True)
class Policies:
    """All tenants'."""

    default: TenantPolicy
    by_name: Mapping[str, TenantPolicy]

    def of(self, tenant: str) -> TenantPolicy:
        return self.by_name.get(tenant, self.default)

    def engine_tenant(self, tenant: str) -> Tenant:
        """As its requests carry it to the scheduler."""
        policy = self.of(tenant)
        return Tenant(_fitting(tenant), policy.weight, policy.priority)

    def cache_salt(self, tenant: str, given: str) -> str:
        """Of its requests that gave the salt ``given``: equal for equal ones of one tenant or cache group, and never
        for others, whatever they call themselves and give."""
        group = self.of(tenant).cache_group
        whose = f"tenant {tenant}" if group is None else f"group {group}"
        return f"{len(whose)} {whose} {given}"


def _fitting(tenant: str) -> str:
    """Identity providers may have longer names than the engine takes: the end of these is a hash."""
    if len(tenant) <= MAX_TENANT_CHARS:
        return tenant
    digest = hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{tenant[: MAX_TENANT_CHARS - len(digest)]}{digest}"


NO_POLICIES = Policies(TenantPolicy(), {})


def parse_policies(text: str | bytes, source: str) -> Policies:
    """Raises InvalidOption, naming the key that is wrong."""
    try:
        parsed = _unique_keys(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidOption(f"{source} is neither YAML nor JSON: {_first_line(error)}") from error
    try:
        file = _File.model_validate({} if parsed is None else parsed)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in details["loc"] if part != "[key]") or "the file"
        raise InvalidOption(f"{source}: {key}: {details['msg']}") from error
    return Policies(file.default, file.tenants)


class _Loader(yaml.SafeLoader):
    """A tenant that is named twice is a mistake, not the later one's."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
    if twice is not None:
        raise yaml.YAMLError(f"{twice} is there twice (line {node.start_mark.line + 1} ff.)")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _unique_keys(text: str | bytes) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def load_policies(path: Path) -> Reloaded[Policies]:
    """The file's policies, as of the last poll. Raises InvalidOption."""
    return Reloaded([path], lambda: parse_policies(read_file(path, "--tenants"), f"--tenants {path}"))
