"""What ``--security-file`` can say: who may call, how they prove it, and the certificates of both APIs.

Secrets are never in it, only the files that hold them. A relative path starts at the file's own directory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from cluster.config import is_loopback
from cluster.identity.key_file import check_scopes, check_tenant
from cluster.identity.principal import INFER
from cluster.identity.reloaded import read_file
from engine.errors import InvalidOption

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
"""Signatures with a public key. HMAC and "none" cannot be named here at all."""


def _tenant(value: str) -> str:
    try:
        return check_tenant(value)
    except InvalidOption as error:
        raise ValueError(str(error)) from None


def _scopes(values: Sequence[str]) -> list[str]:
    try:
        return sorted(check_scopes(values))
    except InvalidOption as error:
        raise ValueError(str(error)) from None


def _certificate_name(value: str) -> str:
    kind, _, name = value.partition(":")
    if kind not in ("uri", "dns", "subject") or not name:
        raise ValueError(f"write uri:…, dns:… or subject:…, not {value!r}")
    return f"dns:{name.lower()}" if kind == "dns" else value


def _absolute(value: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("directory", Path())
    return base / value.expanduser()


def _url_or_file(value: str, info: ValidationInfo) -> str:
    return value if "://" in value else str(_absolute(Path(value), info))


File = Annotated[Path, AfterValidator(_absolute)]
Tenant = Annotated[str, AfterValidator(_tenant)]
Scopes = Annotated[list[str], AfterValidator(_scopes)]
CertificateName = Annotated[str, AfterValidator(_certificate_name)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiKeysConfig(_Section):
    """``pepper_file``: by default FILE.pepper."""

    file: File
    pepper_file: File | None = None


class JwtConfig(_Section):
    """Tokens of one OIDC issuer.

    ``jwks``: an https URL (http on this machine only) or a file. ``ca_file``: trusted for that URL instead of the
    system's. ``tenant_claim``: names the tenant; ``tenants`` translates its values, and where it is given no others
    are let in. ``scope_claim``: a list, or words with spaces between them, of which ``scopes`` says what each allows;
    without it every token may infer and no more.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    jwks: Annotated[str, Field(min_length=1), AfterValidator(_url_or_file)]
    ca_file: File | None = None
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = ["RS256", "ES256"]
    tenant_claim: str
    tenants: dict[str, Tenant] = {}
    scope_claim: str | None = None
    scopes: dict[str, str] = {}
    leeway_s: Annotated[int, Field(ge=0, le=300)] = 30

    @property
    def is_url(self) -> bool:
        return "://" in self.jwks

    @model_validator(mode="after")
    def _check(self) -> "JwtConfig":
        url = urlsplit(self.jwks)
        if self.is_url and url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.hostname or "")):
            raise ValueError(f"jwks {self.jwks}: keys must come over https, or from a file")
        if self.scopes:
            _scopes(list(self.scopes.values()))
        if bool(self.scopes) != (self.scope_claim is not None):
            raise ValueError("scope_claim and scopes go together: the claim, and what each of its values allows")
        return self


class CertificateConfig(_Section):
    """A client that its certificate alone identifies."""

    name: CertificateName
    tenant: Tenant
    scopes: Scopes = [INFER]


class GatewayConfig(_Section):
    """A proxy whose word on tenant, priority and client certificate is taken. ``scopes``: of those it vouches for."""

    name: CertificateName
    scopes: Scopes = [INFER]


class TlsConfig(_Section):
    """Of both APIs. ``client_ca_file``: every client must have a certificate that it signed; then ``health_port`` is a
    plain one at the same address, for probes, which have none."""

    certificate_file: File
    key_file: File
    client_ca_file: File | None = None
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = None


class ClusterConfig(_Section):
    """Between front ends and leaders: a certificate with the DNS name remuda-cluster, and who signs such ones."""

    certificate_file: File
    key_file: File
    ca_file: File


class SecurityConfig(_Section):
    """Everything is off by default."""

    api_keys: ApiKeysConfig | None = None
    jwt: list[JwtConfig] = []
    certificates: list[CertificateConfig] = []
    gateways: list[GatewayConfig] = []
    tls: TlsConfig | None = None
    cluster: ClusterConfig | None = None

    @property
    def authenticates(self) -> bool:
        return bool(self.api_keys or self.jwt or self.certificates or self.gateways)

    @model_validator(mode="after")
    def _check(self) -> "SecurityConfig":
        if (self.certificates or self.gateways) and (self.tls is None or self.tls.client_ca_file is None):
            raise ValueError("certificates and gateways need tls with a client_ca_file")
        names = [one.name for one in self.certificates] + [one.name for one in self.gateways]
        if len(set(names)) != len(names):
            raise ValueError("a name stands twice among certificates and gateways")
        issuers = [one.issuer for one in self.jwt]
        if len(set(issuers)) != len(issuers):
            raise ValueError("an issuer stands twice in jwt")
        return self


def load_security(file: Path | None, api_key_file: Path | None) -> SecurityConfig:
    """What ``--security-file`` and ``--api-key-file`` say together. Raises InvalidOption with one line."""
    content: Any = {}
    if file is not None:
        try:
            content = yaml.safe_load(read_file(file, "--security-file")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidOption(f"--security-file {file} is not YAML: {getattr(error, 'problem', error)}") from error
        if not isinstance(content, dict):
            raise InvalidOption(
                f"--security-file {file} must hold sections: api_keys, jwt, certificates, gateways, tls"
            )
    if api_key_file is not None:
        if "api_keys" in content:
            raise InvalidOption(f"--api-key-file and api_keys in {file} say the same; give one of them")
        content = {**content, "api_keys": {"file": api_key_file.absolute()}}
    directory = Path() if file is None else file.parent
    try:
        return SecurityConfig.model_validate(content, context={"directory": directory})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidOption(f"--security-file {file}{f', {path}' if path else ''}: {message}") from None


def check_exposure(host: str, security: SecurityConfig, is_insecure: bool) -> None:
    """Raises InvalidOption where strangers could use what listens at ``host``."""
    if not (is_loopback(host) or security.authenticates or is_insecure):
        raise InvalidOption(
            f"--host {host} can be reached from other machines; give --api-key-file or --security-file, use "
            "--host 127.0.0.1, or say --insecure where the network itself keeps strangers out"
        )
