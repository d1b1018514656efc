"""The file of API keys: one JSON object a line, never a key itself but its HMAC-SHA256 under the server's pepper.

A line that is no JSON object is a key in plain text, for a machine of one's own: tenant ``default``, every scope, at
least 16 characters. Empty lines and lines that begin with # do not count.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import stat
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
MIN_PLAIN_CHARS = 16
"""Of a key in plain text: what an editor or a merge left behind is shorter, and must let nobody in."""
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
            if len(line) < MIN_PLAIN_CHARS:
                raise InvalidOption(
                    f"the keys file {where}, line {number}: a key in plain text has at least {MIN_PLAIN_CHARS} "
                    "characters; remuda keys create makes good ones"
                )
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
            f"the pepper file {path} holds fewer than {PEPPER_BYTES} bytes; put back what the keys were made with"
        )
    return pepper


def pepper_for(path: Path, keys_file: Path, records: Sequence[KeyRecord], random_bytes: RandomBytes) -> bytes:
    """What the next of ``records`` is made with; to be called while they are ``changing``.

    Where there are neither records nor a pepper it is made, for those to read who may read ``keys_file``.

    Raises InvalidOption: there are records and not what they were made with, or the file cannot be used.
    """
    if not path.exists():
        if records:
            raise InvalidOption(
                f"the keys in {keys_file} were made with a pepper that is not at {path}: put it back, or name it with "
                "--pepper-file; where it is lost they are too, so begin a new keys file"
            )
        _replace(Path(os.path.realpath(path)), random_bytes(PEPPER_BYTES).hex().encode() + b"\n", like=keys_file)
    return read_pepper(path)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyRecord]]:
    """The records, to be changed in place; then the file is replaced as a whole, unless an error came.

    One writer at a time. Comments and the keys in plain text stay, in front. Raises InvalidOption.
    """
    # A symbolic link stays one: the server may know the file by either name.
    path = Path(os.path.realpath(path))
    with _locked(path):
        content = read_file(path, "the keys file") if path.exists() else b""
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


def _replace(path: Path, content: bytes, like: Path | None = None) -> None:
    """In one step. The file keeps its owner, group and mode; a new one has those of ``like`` without others' rights, or
    else is its maker's alone. Raises InvalidOption, and leaves what was there."""
    try:
        kept, rights = _status(path), stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO
        if kept is None and like is not None:
            kept, rights = _status(like), stat.S_IRWXU | stat.S_IRWXG
        # mkstemp's files are the owner's alone.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if kept is not None:
                    _hand_over(file.fileno(), path, kept, kept.st_mode & rights)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written: {error.strerror}") from error


def _hand_over(descriptor: int, path: Path, kept: os.stat_result, mode: int) -> None:
    """To the user and group of ``kept``. Raises InvalidOption: a server that runs as that user could not read what is
    somebody else's, and would go on with what it read before."""
    try:
        os.fchown(descriptor, kept.st_uid, kept.st_gid)
        os.fchmod(descriptor, mode)
    except PermissionError:
        raise InvalidOption(
            f"{path} must belong to user {kept.st_uid} and group {kept.st_gid} as before, so that the server can still "
            "read it: run this as that user, or as root"
        ) from None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
