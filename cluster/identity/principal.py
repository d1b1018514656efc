"""Who a request acts for, as one decision for HTTP and gRPC; and how whatever handles the request learns of it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal

from cluster.errors import PermissionDenied

Scope = Literal["infer", "admin", "metrics"]
Kind = Literal["key", "jwt", "certificate", "gateway", "anonymous"]

INFER: Final = "infer"
ADMIN: Final = "admin"
METRICS: Final = "metrics"
ALL_SCOPES: Final[frozenset[str]] = frozenset({INFER, ADMIN, METRICS})
DEFAULT_TENANT: Final = "default"


@dataclass(frozen=True)
class Principal:
    """An authenticated caller; safe to log, it holds no secret.

    ``tenant``: whom usage is counted for and limits hold for. ``key_id``: which of the tenant's credentials was shown:
    the API key's id, ``jwt:SUBJECT``, ``cert:NAME``, or ``gateway-key:KEY`` where a gateway says whose request it is,
    else ``gateway:NAME``; empty for anonymous callers. ``kind``: how the caller proved itself. ``scopes``: what it may
    do. ``priority``: what a trusted gateway asked for, as a request's own ``priority`` (smaller is sooner); None: it
    said nothing.
    """

    tenant: str
    key_id: str
    kind: Kind
    scopes: frozenset[str]
    priority: int | None = None

    def require(self, scope: Scope) -> None:
        """Raises PermissionDenied unless this caller may do what ``scope`` stands for."""
        if scope not in self.scopes:
            raise PermissionDenied(f"these credentials do not have the scope {scope!r}; use some that do")


ANONYMOUS: Final = Principal(DEFAULT_TENANT, "", "anonymous", ALL_SCOPES)
"""Everybody, where authentication is off."""
NOBODY: Final = Principal(DEFAULT_TENANT, "", "anonymous", frozenset())
"""Outside every authenticated request, and on paths that ask for no credentials."""

_current: ContextVar[Principal] = ContextVar("remuda_principal", default=NOBODY)


def current_principal() -> Principal:
    """Of the HTTP request or gRPC call that the running task serves; tasks that it creates inherit it."""
    return _current.get()


@contextlib.contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """What runs inside acts for ``principal``. The gates of HTTP and gRPC enter it once per request."""
    token = _current.set(principal)
    try:
        yield
    finally:
        _current.reset(token)
