"""API keys as they are shown: which key, whether it is right, and whom it stands for."""

import hmac
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Unauthenticated
from cluster.identity.key_file import (
    PEPPER_BYTES,
    KeyFile,
    RandomBytes,
    default_pepper_file,
    digest_of,
    key_id_of,
    read_key_file,
    read_pepper,
)
from cluster.identity.principal import ALL_SCOPES, DEFAULT_TENANT, Principal
from cluster.identity.reloaded import Reloaded, warn_if_readable_by_all
from engine.errors import InvalidOption

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    digest: bytes
    principal: Principal
    expires_unix_s: float | None = None
    is_revoked: bool = False


@dataclass(frozen=True)
class KeyTable:
    """One state of the keys. ``decoy``: what an unknown key is compared with, at the cost of a known one."""

    pepper: bytes
    entries: Mapping[str, _Entry]
    decoy: _Entry

    def check(self, key: str, now_unix_s: float) -> Principal:
        """Whom ``key`` stands for. Raises Unauthenticated; an unknown id and a wrong secret look alike, in time too."""
        digest = digest_of(key, self.pepper)
        entry = self.entries.get(key_id_of(key, digest), self.decoy)
        if not hmac.compare_digest(digest, entry.digest):
            raise Unauthenticated("the API key is not valid here")
        # From here on the caller has the key, and may know what became of it.
        if entry.is_revoked:
            raise Unauthenticated("the API key was revoked; ask for another")
        if entry.expires_unix_s is not None and entry.expires_unix_s <= now_unix_s:
            raise Unauthenticated("the API key has expired; ask for another")
        return entry.principal


def make_table(file: KeyFile, pepper: bytes, random_bytes: RandomBytes) -> KeyTable:
    """``pepper``: what the file's digests were made with."""
    entries = {
        record.id: _Entry(
            bytes.fromhex(record.digest),
            Principal(record.tenant, record.id, "key", frozenset(record.scopes)),
            record.expires_unix_s,
            record.revoked_unix_s is not None,
        )
        for record in file.records
    }
    for key in file.plain:
        digest = digest_of(key, pepper)
        key_id = key_id_of(key, digest)
        entries[key_id] = _Entry(digest, Principal(DEFAULT_TENANT, key_id, "key", ALL_SCOPES))
    return KeyTable(pepper, entries, _Entry(random_bytes(32), Principal(DEFAULT_TENANT, "", "key", frozenset())))


class ApiKeys:
    """The keys of a file, as of the last ``poll``.

    Args:
        file: see cluster.identity.key_file.
        pepper_file: None: beside it; it may be missing where all keys are in plain text.
        random_bytes: for what nobody may guess.

    Raises:
        InvalidOption: a file that cannot be read, or holds no key.
    """

    def __init__(self, file: Path, pepper_file: Path | None, random_bytes: RandomBytes) -> None:
        self._file = file
        self._pepper_file = pepper_file or default_pepper_file(file)
        self._random_bytes = random_bytes
        # Ids of keys in plain text, made with it, stay while the process lives.
        self._own_pepper = random_bytes(PEPPER_BYTES)
        warn_if_readable_by_all(file, "the keys file")
        warn_if_readable_by_all(self._pepper_file, "the pepper file")
        self._table: Reloaded[KeyTable] = Reloaded([file, self._pepper_file], self._load)
        self.poll: Callable[[], bool] = self._table.poll
        if not self._table.value.entries:
            raise InvalidOption(f"the keys file {file} holds no keys; remuda keys create makes one")

    def check(self, key: str, now_unix_s: float) -> Principal:
        """Whom ``key`` stands for. Raises Unauthenticated."""
        return self._table.value.check(key, now_unix_s)

    def _load(self) -> KeyTable:
        file = read_key_file(self._file)
        if file.plain and file.records:
            # Where there are records there are tenants, and each of these keys is above all of them.
            _log.warning(
                "the keys file %s has %d keys in plain text beside others: each may do everything, as tenant %s",
                self._file,
                len(file.plain),
                DEFAULT_TENANT,
            )
        needs_pepper = bool(file.records) or self._pepper_file.exists()
        pepper = read_pepper(self._pepper_file) if needs_pepper else self._own_pepper
        return make_table(file, pepper, self._random_bytes)
