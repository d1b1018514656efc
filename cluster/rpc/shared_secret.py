"""A secret that front ends show to leaders, as metadata of every call."""

import hmac
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import Unauthenticated
from engine.errors import InvalidOption

_KEY = "x-remuda-secret"

Metadata = Iterable[tuple[str, str | bytes]]


def read_secret(file: Path) -> str:
    """What stands in it, which may be nothing. Raises InvalidOption."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidOption(f"--secret-file {file} cannot be read: {error.strerror}") from error


def required_secret(file: Path) -> str:
    """Raises InvalidOption, also where nothing stands in it."""
    secret = read_secret(file)
    if not secret:
        raise InvalidOption(
            f"--secret-file {file} is empty; write a secret into it, for example of openssl rand -hex 32"
        )
    return secret


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
