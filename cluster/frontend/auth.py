"""Who may call: bearer tokens from a file, compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import Unauthenticated
from engine.errors import InvalidOption


class ApiKeys:
    """Args:
    keys: those that are accepted; none at all lets everybody in.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> None:
        """``authorization`` is the header's or metadata's value. Raises Unauthenticated."""
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("no API key was given; send the header Authorization: Bearer KEY")
        given = _digest(key.strip())
        # Every key is compared, so that the time does not tell which one was nearly right.
        if not sum(hmac.compare_digest(given, digest) for digest in self._digests):
            raise Unauthenticated("the API key is not valid here")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_api_keys(path: Path) -> ApiKeys:
    """One key per line; empty lines and lines that begin with # do not count. Raises InvalidOption."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidOption(f"--api-key-file {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InvalidOption(f"--api-key-file {path} holds no key; write one per line, or leave the option out")
    return ApiKeys(keys)
