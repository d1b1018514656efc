"""The one decision, for HTTP and gRPC alike: what was shown → whom it stands for."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import Unauthenticated
from cluster.identity.api_keys import ApiKeys
from cluster.identity.certificates import forwarded_names, names_of
from cluster.identity.config import CertificateConfig, GatewayConfig, SecurityConfig
from cluster.identity.jwks import make_cache
from cluster.identity.key_file import RandomBytes, check_tenant
from cluster.identity.principal import ANONYMOUS, Principal
from cluster.identity.tokens import TokenVerifier, looks_like_token, unverified_issuer
from engine.errors import InvalidOption

AUTHORIZATION = "authorization"
API_KEY = "x-api-key"
"""Where Anthropic's clients put a key."""
TENANT = "x-remuda-tenant"
KEY = "x-remuda-key"
"""Who it is within the tenant, as the gateway knows them."""
PRIORITY = "x-remuda-priority"
FORWARDED_CERTIFICATE = "x-forwarded-client-cert"
ENDPOINT = "x-gateway-destination-endpoint"

IDENTITY_HEADERS = frozenset({AUTHORIZATION, API_KEY, TENANT, KEY, PRIORITY, FORWARDED_CERTIFICATE, ENDPOINT})
"""Nothing behind the gates sees them: they are secrets, or claims that only a gateway may make."""
_MAX_PRIORITY = 1_000_000
_KEY = re.compile(r"[\x20-\x7e]{1,200}")


@dataclass(frozen=True)
class Credentials:
    """What came with a request. ``certificate``: DER, of the connection's peer, whose chain and possession TLS has
    checked. It is not shown in logs."""

    headers: Mapping[str, Sequence[str]] = field(repr=False)
    certificate: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]], certificate: bytes | None) -> "Credentials":
        """``pairs``: all headers or metadata, names in lower case."""
        headers: dict[str, list[str]] = {}
        for name, value in pairs:
            if name in IDENTITY_HEADERS:
                headers.setdefault(name, []).append(value)
        return cls(headers, certificate)

    def one(self, name: str) -> str | None:
        """Raises Unauthenticated where it came more than once: which one counts would be anybody's guess."""
        values = self.headers.get(name, ())
        if len(values) > 1:
            raise Unauthenticated(f"the header {name} was given {len(values)} times; give it once")
        return values[0] if values else None


class Authenticator:
    """Args:
    keys: None: there are none.
    tokens: by issuer.
    certificates: clients, by their certificates' names.
    gateways: proxies whose word is taken, by their certificates' names.
    now_unix_s: the time.

    With none of the four everybody is let in, as ``ANONYMOUS``.
    """

    def __init__(
        self,
        keys: ApiKeys | None = None,
        tokens: Mapping[str, TokenVerifier] | None = None,
        certificates: Sequence[CertificateConfig] = (),
        gateways: Sequence[GatewayConfig] = (),
        now_unix_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._keys = keys
        self._tokens = tokens or {}
        self._certificates = {one.name: one for one in certificates}
        self._gateways = {one.name: one for one in gateways}
        self._now_unix_s = now_unix_s

    @property
    def is_open(self) -> bool:
        """Whether nobody has to prove anything."""
        return not (self._keys or self._tokens or self._certificates or self._gateways)

    def poll(self) -> None:
        """Reads the keys again where they have changed. Blocks on the file system."""
        if self._keys is not None:
            self._keys.poll()

    async def authenticate(self, shown: Credentials) -> Principal:
        """Whom the caller acts for.

        Raises:
            Unauthenticated: nothing was shown, or something that is not valid. What is shown must be right: a wrong
                key is not made good by a right certificate.
            PermissionDenied: a valid token of no tenant here.
            Unavailable: a token that cannot be checked now.
        """
        if self.is_open:
            return ANONYMOUS
        names = names_of(shown.certificate) if shown.certificate is not None else ()
        gateway = next((self._gateways[name] for name in names if name in self._gateways), None)
        if gateway is None:
            return await self._of_client(shown, names)
        return await self._through(gateway, shown, names)

    async def _through(self, gateway: GatewayConfig, shown: Credentials, names: Sequence[str]) -> Principal:
        """A request that a proven gateway brings."""
        priority = _priority(shown.one(PRIORITY))
        tenant, key = shown.one(TENANT), shown.one(KEY)
        if tenant is not None:
            scopes = frozenset(gateway.scopes)
            return Principal(_tenant(tenant), _key_id(gateway, key), "gateway", scopes, priority)
        forwarded = shown.one(FORWARDED_CERTIFICATE)
        client_names = forwarded_names(forwarded) if forwarded is not None else names
        return replace(await self._of_client(shown, client_names), priority=priority)

    async def _of_client(self, shown: Credentials, names: Sequence[str]) -> Principal:
        secret = _bearer(shown.one(AUTHORIZATION)) or shown.one(API_KEY)
        if secret is not None:
            return await self._of_secret(secret)
        rule = next((self._certificates[name] for name in names if name in self._certificates), None)
        if rule is not None:
            return Principal(rule.tenant, f"cert:{rule.name}"[:128], "certificate", frozenset(rule.scopes))
        raise Unauthenticated("no API key or token was given; send the header Authorization: Bearer KEY")

    async def _of_secret(self, secret: str) -> Principal:
        if self._tokens and looks_like_token(secret):
            verifier = self._tokens.get(unverified_issuer(secret))
            if verifier is None:
                raise Unauthenticated("the token is not valid here: its issuer is not trusted")
            return await verifier.check(secret)
        if self._keys is None:
            raise Unauthenticated("API keys are not taken here; send a token, or use a client certificate")
        return self._keys.check(secret, self._now_unix_s())


def _bearer(authorization: str | None) -> str | None:
    """Raises Unauthenticated for another scheme."""
    if authorization is None:
        return None
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated("the header Authorization is not understood; send Authorization: Bearer KEY")
    return secret.strip()


def _tenant(named: str) -> str:
    try:
        return check_tenant(named)
    except InvalidOption as error:
        raise Unauthenticated(f"the gateway's header {TENANT}: {error}") from None


def _key_id(gateway: GatewayConfig, key: str | None) -> str:
    """Raises Unauthenticated: it would be in logs and metrics as it is."""
    if key is None:
        return f"gateway:{gateway.name}"[:128]
    if not _KEY.fullmatch(key):
        raise Unauthenticated(f"the gateway's header {KEY} must have 1 to 200 printable ASCII characters")
    return f"gateway-key:{key}"


def _priority(text: str | None) -> int | None:
    """Raises Unauthenticated, for a proven gateway's mistake is not the client's."""
    if text is None:
        return None
    try:
        priority = int(text)
    except ValueError:
        priority = _MAX_PRIORITY + 1
    if abs(priority) > _MAX_PRIORITY:
        raise Unauthenticated(f"the gateway's header {PRIORITY} is no number of at most {_MAX_PRIORITY}")
    return priority


def make_authenticator(
    config: SecurityConfig, now_unix_s: Callable[[], float], now_s: Callable[[], float], random_bytes: RandomBytes
) -> Authenticator:
    """Args:
        now_unix_s: the time of day, for expiry.
        now_s: a clock that never goes back, for how old fetched keys are.

    Raises InvalidOption: keys that cannot be read.
    """
    section = config.api_keys
    keys = None if section is None else ApiKeys(section.file, section.pepper_file, random_bytes)
    tokens = {one.issuer: TokenVerifier(one, make_cache(one, now_s), now_unix_s) for one in config.jwt}
    return Authenticator(keys, tokens, config.certificates, config.gateways, now_unix_s)
