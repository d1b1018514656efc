"""JSON Web Tokens of an OIDC issuer: signature by an allowed algorithm, claims, and the tenant they name (RFC 7519,
RFC 8725)."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jws import JWSRegistry
from joserfc.util import urlsafe_b64decode

from cluster.errors import PermissionDenied, Unauthenticated
from cluster.identity.config import JwtConfig
from cluster.identity.jwks import JwksCache
from cluster.identity.key_file import check_tenant
from cluster.identity.principal import INFER, Principal
from engine.errors import InvalidOption

MAX_TOKEN_CHARS = 16 << 10
_MAX_KEY_ID_CHARS = 256

_S = TypeVar("_S", bound=msgspec.Struct)


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None


class _Issuer(msgspec.Struct):
    iss: str


def looks_like_token(text: str) -> bool:
    """Three parts between dots; an API key of ours has none."""
    return text.count(".") == 2


def unverified_issuer(token: str) -> str:
    """Whose token it says it is, to find the keys that must prove it. Raises Unauthenticated."""
    return _part(token, 1, _Issuer).iss


class TokenVerifier:
    """Args:
    config: the issuer and what its claims mean.
    keys: its public keys.
    now_unix_s: the time that the issuer's clock shows too, but for the leeway.
    """

    def __init__(self, config: JwtConfig, keys: JwksCache, now_unix_s: Callable[[], float]) -> None:
        self._config = config
        self._keys = keys
        # Issuers put names of their own into headers; "crit" is looked at all the same.
        self._registry = JWSRegistry(algorithms=config.algorithms, strict_check_header=False)
        self._claims = jwt.JWTClaimsRegistry(
            now=lambda: int(now_unix_s()),
            leeway=config.leeway_s,
            iss={"essential": True, "value": config.issuer},
            aud={"essential": True, "value": config.audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    async def check(self, token: str) -> Principal:
        """Whom the token stands for.

        Raises:
            Unauthenticated: it is none, or not this issuer's, or not (or no longer) valid.
            PermissionDenied: it is valid and names no tenant that may call.
            Unavailable: the issuer's keys cannot be had.
        """
        header = _part(token, 0, _Header)
        # Before any key is looked for: what a token says of itself must not choose how it is checked.
        if header.alg not in self._config.algorithms:
            raise Unauthenticated(f"tokens must be signed with {', '.join(self._config.algorithms)}")
        if header.kid is not None and len(header.kid) > _MAX_KEY_ID_CHARS:
            raise Unauthenticated("the token is not valid here: its key id is too long")
        key = await self._keys.find(header.kid)
        if key is None or key.get("alg", header.alg) != header.alg:
            raise Unauthenticated("the token is not valid here: its issuer has no such key")
        try:
            claims = jwt.decode(token, key, self._config.algorithms, self._registry).claims
            self._claims.validate(claims)
        except ExpiredTokenError:
            raise Unauthenticated("the token has expired; get another") from None
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise Unauthenticated(f"the token is not valid here: {_reason(error)}") from None
        return Principal(self._tenant(claims), f"jwt:{claims['sub']}"[:128], "jwt", self._scopes(claims))

    def _tenant(self, claims: jwt.Claims) -> str:
        named = claims.get(self._config.tenant_claim)
        values = [value for value in (named if isinstance(named, list) else [named]) if isinstance(value, str)]
        if self._config.tenants:
            found = next((self._config.tenants[value] for value in values if value in self._config.tenants), None)
            if found is not None:
                return found
        elif len(values) == 1:
            try:
                return check_tenant(values[0])
            except InvalidOption:
                pass
        raise PermissionDenied(f"the token's claim {self._config.tenant_claim!r} names no tenant that may call here")

    def _scopes(self, claims: jwt.Claims) -> frozenset[str]:
        if self._config.scope_claim is None:
            return frozenset({INFER})
        named = claims.get(self._config.scope_claim, "")
        values = named.split() if isinstance(named, str) else named if isinstance(named, list) else []
        known = self._config.scopes
        return frozenset(known[value] for value in values if isinstance(value, str) and value in known)


def _reason(error: Exception) -> str:
    """What joserfc found wrong, by its own short name; never what stands in the token."""
    return error.error.replace("_", " ") if isinstance(error, JoseError) else "it cannot be read"


def _part(token: str, index: int, kind: type[_S]) -> _S:
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated("the token is not valid here: it cannot be read")
    try:
        return msgspec.json.decode(urlsafe_b64decode(parts[index].encode("ascii")), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Unauthenticated("the token is not valid here: it cannot be read") from None
