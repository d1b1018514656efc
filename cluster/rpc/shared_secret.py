"""A secret that front ends show to leaders, as metadata of every call."""

import hmac
from collections.abc import Iterable

from cluster.errors import Unauthenticated

_KEY = "x-remuda-secret"

Metadata = Iterable[tuple[str, str | bytes]]


def secret_metadata(secret: str) -> tuple[tuple[str, str], ...]:
    """What a client sends; nothing where there is no secret."""
    return ((_KEY, secret),) if secret else ()


def check_secret(secret: str, metadata: Metadata | None) -> None:
    """Raises Unauthenticated where a secret is asked for and the metadata do not hold it."""
    if not secret:
        return
    shown = next((value for key, value in metadata or () if key == _KEY), "")
    shown_bytes = shown if isinstance(shown, bytes) else shown.encode()
    if not hmac.compare_digest(shown_bytes, secret.encode()):
        raise Unauthenticated("the caller does not know this cluster's secret")
