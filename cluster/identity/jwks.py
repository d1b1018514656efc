"""The public keys of a token issuer: fetched when they are needed, kept while they are fresh, or nobody has others."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key

from cluster.errors import Unavailable
from cluster.identity.config import JwtConfig

_log = logging.getLogger(__name__)

URL_MAX_AGE_S = 300.0
URL_COOLDOWN_S = 10.0
FILE_MAX_AGE_S = 1.0
MAX_STALE_S = 24 * 3600.0
"""Longer than any outage that must not lock everybody out, shorter than a withdrawn key should live."""
FETCH_TIMEOUT_S = 5.0
MAX_JWKS_BYTES = 1 << 20

Fetch = Callable[[], Awaitable[bytes]]


class BadKeySet(Exception):
    """What came is no key set that can be used."""


class _JwkSet(msgspec.Struct):
    keys: list[dict[str, object]]


class JwksCache:
    """Args:
    fetch: gets the key set's JSON; its own exceptions are OSError, httpx.HTTPError and BadKeySet.
    now_s: a clock that never goes back.
    max_age_s: keys older than this are fetched again before they are used.
    cooldown_s: at least so long between two attempts, whatever key ids strangers ask for.
    """

    def __init__(self, fetch: Fetch, now_s: Callable[[], float], max_age_s: float, cooldown_s: float) -> None:
        self._fetch = fetch
        self._now_s = now_s
        self._max_age_s = max_age_s
        self._cooldown_s = cooldown_s
        self._keys: list[Key] = []
        self._fetched_s: float | None = None
        self._tried_s: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._is_down = False
        """The last attempt failed."""

    async def find(self, key_id: str | None) -> Key | None:
        """The key of that id, or the only key there is where the token names none. None: there is no such key.

        Raises Unavailable while there are no keys at all, or only ones that are too old to be trusted.
        """
        if self._age_s() > self._max_age_s:
            # An issuer that does not answer costs one request its patience, not every one.
            await self._refresh(waits=not self._is_down or self._age_s() > MAX_STALE_S)
        key = self._lookup(key_id)
        if key is None and key_id is not None:
            # The issuer may have begun to sign with a key that it did not have before.
            await self._refresh()
            key = self._lookup(key_id)
        if self._age_s() > MAX_STALE_S:
            raise Unavailable("tokens cannot be checked now: their issuer gives no keys", self._cooldown_s)
        return key

    def _age_s(self) -> float:
        return float("inf") if self._fetched_s is None else self._now_s() - self._fetched_s

    def _lookup(self, key_id: str | None) -> Key | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.kid == key_id), None)

    async def _refresh(self, *, waits: bool = True) -> None:
        """One attempt for all who wait for it, none in the cooldown. What was known stays where it fails."""
        if self._fetching is None:
            if self._tried_s is not None and self._now_s() - self._tried_s < self._cooldown_s:
                return
            self._tried_s = self._now_s()
            self._fetching = asyncio.create_task(self._try())
        if waits:
            # A request that goes away must not end what others wait for.
            await asyncio.shield(self._fetching)

    async def _try(self) -> None:
        try:
            keys = parse_key_set(await self._fetch())
        except (OSError, httpx.HTTPError, BadKeySet) as error:
            _log.warning("a token issuer's keys cannot be fetched; those known stay: %s", error)
            self._is_down = True
        else:
            self._is_down = False
            self._keys = keys
            self._fetched_s = self._now_s()
        finally:
            self._fetching = None


def parse_key_set(content: bytes) -> list[Key]:
    """The keys that may verify signatures. Symmetric ones are no public keys and are left out. Raises BadKeySet."""
    try:
        entries = msgspec.json.decode(content, type=_JwkSet).keys
    except msgspec.MsgspecError as error:
        raise BadKeySet(f"not a JSON Web Key Set: {error}") from None
    keys = [key for entry in entries if (key := _import(entry)) is not None]
    if not keys:
        raise BadKeySet("the key set has no public key for signatures")
    return keys


def _import(entry: dict[str, object]) -> Key | None:
    if entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("use", "sig") != "sig":
        return None
    try:
        return JWKRegistry.import_key({name: value for name, value in entry.items() if isinstance(value, str)})
    except (JoseError, ValueError, KeyError) as error:
        # One key of a kind that we do not know must not cost the others.
        _log.warning("a key of a key set is left out: %s", error)
        return None


def make_cache(config: JwtConfig, now_s: Callable[[], float]) -> JwksCache:
    """Of a URL or a file."""
    if config.is_url:
        return JwksCache(_url_fetch(config.jwks, config.ca_file), now_s, URL_MAX_AGE_S, URL_COOLDOWN_S)
    return JwksCache(_file_fetch(Path(config.jwks)), now_s, FILE_MAX_AGE_S, FILE_MAX_AGE_S)


def _url_fetch(url: str, ca_file: Path | None) -> Fetch:
    async def fetch() -> bytes:
        verify = True if ca_file is None else httpx.create_ssl_context(verify=str(ca_file))
        async with (
            asyncio.timeout(FETCH_TIMEOUT_S),
            httpx.AsyncClient(verify=verify, timeout=FETCH_TIMEOUT_S, follow_redirects=False) as client,
            client.stream("GET", url, headers={"accept": "application/json"}) as response,
        ):
            if response.status_code != 200:
                raise BadKeySet(f"status {response.status_code}")
            return await _bounded(response)

    return fetch


async def _bounded(response: httpx.Response) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in response.aiter_bytes():
        num_bytes += len(chunk)
        if num_bytes > MAX_JWKS_BYTES:
            raise BadKeySet(f"more than {MAX_JWKS_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _file_fetch(path: Path) -> Fetch:
    # Its own: the threads that everybody shares may be at work for clients, who would then decide how old keys get.
    thread = ThreadPoolExecutor(1, thread_name_prefix="jwks")

    async def fetch() -> bytes:
        return await asyncio.get_running_loop().run_in_executor(thread, path.read_bytes)

    return fetch
