"""The file of API keys: one JSON object a line, never a key itself but its HMAC-SHA256 under the server's pepper.

A line that is no JSON object is a key in plain text, for a machine of one's own: tenant ``default``, every scope.
Empty lines and lines that begin with # do not count.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.identity.principal import ALL_SCOPES, INFER
from cluster.identity.reloaded import read_file
from engine.errors import InvalidOption

KEY_PREFIX = "rmd"
PEPPER_BYTES = 32
_ID_BYTES = 6
_SECRET_BYTES = 32
_KEY = re.compile(rf"{KEY_PREFIX}_([0-9a-f]{{12}})_[0-9a-f]{{64}}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

RandomBytes = Callable[[int], bytes]


class KeyRecord(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key as the file has it. Times are Unix times in seconds; None: never."""

    id: str
    tenant: str
    digest: str
    created_unix_s: int
    scopes: tuple[str, ...] = (INFER,)
    name: str = ""
    expires_unix_s: int | None = None
    revoked_unix_s: int | None = None

    def state(self, now_unix_s: float) -> str:
        """active, expired or revoked."""
        if self.revoked_unix_s is not None:
            return "revoked"
        return "expired" if self.expires_unix_s is not None and self.expires_unix_s <= now_unix_s else "active"


@dataclass(frozen=True)
class KeyFile:
    """``plain``: keys in plain text."""

    records: tuple[KeyRecord, ...]
    plain: tuple[str, ...] = ()


def key_id_of(key: str, digest: bytes) -> str:
    """Of a key of ours the id it names; of any other text one that tells nothing about it."""
    match = _KEY.fullmatch(key)
    return match[1] if match else f"plain-{digest[:6].hex()}"


def digest_of(key: str, pepper: bytes) -> bytes:
    """HMAC-SHA256 of the whole key, its id included."""
    return hmac.digest(pepper, key.encode("utf-8", "surrogateescape"), hashlib.sha256)


def check_tenant(tenant: str) -> str:
    """``tenant`` if it can be one. Raises InvalidOption."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidOption(
            f"{tenant[:80]!r} is no tenant's name; take up to 64 letters, digits, dots, dashes, @ and underscores"
        )
    return tenant


def check_scopes(scopes: Sequence[str]) -> frozenset[str]:
    """As a set. Raises InvalidOption for one that does not exist, and for none at all."""
    unknown = [scope for scope in scopes if scope not in ALL_SCOPES]
    if unknown or not scopes:
        raise InvalidOption(f"scopes {', '.join(scopes) or 'none'}: give some of {', '.join(sorted(ALL_SCOPES))}")
    return frozenset(scopes)


def new_key(
    tenant: str,
    scopes: Sequence[str],
    pepper: bytes,
    now_unix_s: float,
    random_bytes: RandomBytes,
    name: str = "",
    lifetime_s: float | None = None,
) -> tuple[str, KeyRecord]:
    """A key, which is shown once, and what is kept of it. Raises InvalidOption."""
    key_id = random_bytes(_ID_BYTES).hex()
    key = f"{KEY_PREFIX}_{key_id}_{random_bytes(_SECRET_BYTES).hex()}"
    record = KeyRecord(
        id=key_id,
        tenant=check_tenant(tenant),
        digest=digest_of(key, pepper).hex(),
        created_unix_s=int(now_unix_s),
        scopes=tuple(sorted(check_scopes(scopes))),
        name=name,
        expires_unix_s=None if lifetime_s is None else int(now_unix_s + lifetime_s),
    )
    return key, record


def parse_key_file(content: bytes, where: Path) -> KeyFile:
    """Raises InvalidOption, which names the line and never quotes it."""
    records: dict[str, KeyRecord] = {}
    plain: list[str] = []
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InvalidOption(f"the keys file {where} is not UTF-8 text") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if not line.startswith("{"):
            plain.append(line)
            continue
        try:
            record = msgspec.json.decode(line, type=KeyRecord)
            if len(bytes.fromhex(record.digest)) != hashlib.sha256().digest_size:
                raise ValueError("its digest is too short")
        except (msgspec.MsgspecError, ValueError) as error:
            raise InvalidOption(f"the keys file {where}, line {number}: {error}") from None
        check_tenant(record.tenant)
        check_scopes(record.scopes)
        if record.id in records:
            raise InvalidOption(f"the keys file {where}, line {number}: the id {record.id} is there twice")
        records[record.id] = record
    return KeyFile(tuple(records.values()), tuple(plain))


def read_key_file(path: Path) -> KeyFile:
    """Raises InvalidOption."""
    return parse_key_file(read_file(path, "the keys file"), path)


def default_pepper_file(path: Path) -> Path:
    """Beside the keys file."""
    return path.with_name(path.name + ".pepper")


def read_pepper(path: Path) -> bytes:
    """Raises InvalidOption where there is none, or a short one."""
    pepper = read_file(path, "the pepper file").strip()
    if len(pepper) < PEPPER_BYTES:
        raise InvalidOption(
            f"the pepper file {path} holds fewer than {PEPPER_BYTES} bytes; remuda keys create makes one"
        )
    return pepper


def make_pepper(path: Path, random_bytes: RandomBytes) -> bytes:
    """Writes a new one, which nobody else can read, unless there is one already. Raises InvalidOption."""
    if not path.exists():
        _write_new(path, random_bytes(PEPPER_BYTES).hex().encode() + b"\n")
    return read_pepper(path)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyRecord]]:
    """The records, to be changed in place; then the file is replaced as a whole, unless an error came.

    One writer at a time. Comments and the keys in plain text stay, in front. Raises InvalidOption.
    """
    with _locked(path):
        content = path.read_bytes() if path.exists() else b""
        records = list(parse_key_file(content, path).records)
        yield records
        others = [line for line in content.decode().splitlines() if not line.strip().startswith("{")]
        lines = [line.encode() for line in others] + [msgspec.json.encode(record) for record in records]
        _replace(path, b"".join(line + b"\n" for line in lines))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The directory is locked, for the file itself is replaced.
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InvalidOption(f"the directory of {path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    """In one step, with mode 0600. Raises InvalidOption."""
    try:
        # mkstemp's files are the owner's alone.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written: {error.strerror}") from error


def _write_new(path: Path, content: bytes) -> None:
    """Raises InvalidOption; it is no error that somebody else was quicker."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
