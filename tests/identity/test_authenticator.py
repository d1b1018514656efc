"""The one decision: what beats what, and whose word is taken."""

import os
import ssl
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from cluster.config import ServeConfig
from cluster.errors import Unauthenticated
from cluster.identity.authenticator import Authenticator, Credentials, make_authenticator
from cluster.identity.config import SecurityConfig, check_exposure, load_security
from cluster.identity.principal import ANONYMOUS, NOBODY, Principal, acting_as, current_principal
from engine.errors import InvalidOption
from tests.identity.authority import Authority

GATEWAY, CLIENT, STRANGER = "spiffe://corp/gateway", "spiffe://corp/client", "spiffe://corp/stranger"


@cache
def certificate(uri: str) -> bytes:
    """DER."""
    pem, _ = Authority().issue("any", x509.UniformResourceIdentifier(uri))
    return ssl.PEM_cert_to_DER_cert(pem.decode())


@pytest.fixture
def authenticator(tmp_path: Path) -> Authenticator:
    (tmp_path / "keys").write_text("alpha-of-the-herd\n")
    config = SecurityConfig.model_validate(
        {
            "api_keys": {"file": str(tmp_path / "keys")},
            "certificates": [{"name": f"uri:{CLIENT}", "tenant": "team-c"}],
            "gateways": [{"name": f"uri:{GATEWAY}"}],
            "tls": {"certificate_file": "x", "key_file": "x", "client_ca_file": "x"},
        }
    )
    return make_authenticator(config, lambda: 0.0, lambda: 0.0, os.urandom)


def shown(uri: str | None = None, *pairs: tuple[str, str], **headers: str) -> Credentials:
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Credentials.of([*named, *pairs], certificate(uri) if uri else None)


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


SPOOFED = {
    "x_remuda_tenant": "team-c",
    "x_remuda_key": "alice",
    "x_remuda_priority": "-5",
    "x_forwarded_client_cert": f"URI={CLIENT}",
}


async def test_nothing_configured_lets_everybody_in_as_nobody_in_particular() -> None:
    assert await Authenticator().authenticate(shown(**SPOOFED)) is ANONYMOUS


async def test_keys_in_either_header(authenticator: Authenticator) -> None:
    key = "alpha-of-the-herd"
    for credentials in (shown(None, bearer(key)), shown(x_api_key=key), shown(authorization=f"bearer  {key} ")):
        found = await authenticator.authenticate(credentials)
        assert (found.tenant, found.kind, found.priority) == ("default", "key", None)


@pytest.mark.parametrize("uri", [None, STRANGER, CLIENT])
async def test_only_gateways_speak_for_others(authenticator: Authenticator, uri: str | None) -> None:
    found = await authenticator.authenticate(shown(uri, bearer("alpha-of-the-herd"), **SPOOFED))
    assert (found.tenant, found.kind, found.priority) == ("default", "key", None)
    assert "alice" not in found.key_id
    if uri != CLIENT:
        with pytest.raises(Unauthenticated, match="no API key or token was given"):
            await authenticator.authenticate(shown(uri, **SPOOFED))


async def test_a_certificate_alone(authenticator: Authenticator) -> None:
    found = await authenticator.authenticate(shown(CLIENT))
    assert (found.tenant, found.key_id, found.kind) == ("team-c", f"cert:uri:{CLIENT}", "certificate")


async def test_a_wrong_key_is_not_made_good_by_a_right_certificate(authenticator: Authenticator) -> None:
    for uri in (CLIENT, GATEWAY):
        with pytest.raises(Unauthenticated, match="not valid"):
            await authenticator.authenticate(shown(uri, bearer("wrong")))


async def test_what_a_gateway_says_counts(authenticator: Authenticator) -> None:
    headers = {"x_remuda_tenant": "team-g", "x_remuda_priority": "-5"}
    found = await authenticator.authenticate(shown(GATEWAY, **headers))
    assert (found.tenant, found.kind, found.priority) == ("team-g", "gateway", -5)
    assert found.scopes == {"infer"} and found.key_id == f"gateway:uri:{GATEWAY}"
    for key in ("alice", "auth0|5f7c8ec7", "x" * 200, "a b"):
        found = await authenticator.authenticate(shown(GATEWAY, **headers, x_remuda_key=key))
        assert (found.tenant, found.key_id) == ("team-g", f"gateway-key:{key}")
    by_key = await authenticator.authenticate(shown(GATEWAY, bearer("alpha-of-the-herd"), x_remuda_priority="3"))
    assert (by_key.tenant, by_key.kind, by_key.priority) == ("default", "key", 3)
    claimed = await authenticator.authenticate(shown(GATEWAY, bearer("alpha-of-the-herd"), x_remuda_key="alice"))
    assert claimed.key_id == by_key.key_id, "a key of our own is who it is"
    forwarded = await authenticator.authenticate(shown(GATEWAY, x_forwarded_client_cert=f"URI={CLIENT}"))
    assert (forwarded.tenant, forwarded.kind) == ("team-c", "certificate")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x_forwarded_client_cert": f"URI={STRANGER}"},
        {"x_forwarded_client_cert": f"URI={CLIENT},URI={STRANGER}"},
        {"x_remuda_tenant": ""},
        {"x_remuda_tenant": "a b"},
        {"x_remuda_tenant": "team-g", "x_remuda_priority": "high"},
        {"x_remuda_tenant": "team-g", "x_remuda_key": ""},
        {"x_remuda_tenant": "team-g", "x_remuda_key": "x" * 201},
        {"x_remuda_tenant": "team-g", "x_remuda_key": "bob\n"},
        {"x_remuda_tenant": "team-g", "x_remuda_key": "b\xf6b"},
        {"x_remuda_tenant": "team-g", "x_remuda_priority": "9" * 5000},
    ],
)
async def test_a_gateway_that_says_nothing_useful(authenticator: Authenticator, headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(shown(GATEWAY, **headers))


@pytest.mark.parametrize("name", ["authorization", "x-remuda-tenant", "x-remuda-key", "x-forwarded-client-cert"])
async def test_a_header_that_came_twice_is_nobodys_choice(authenticator: Authenticator, name: str) -> None:
    both = [(name, f"URI={CLIENT}"), (name, "Bearer alpha-of-the-herd")]
    with pytest.raises(Unauthenticated, match="2 times"):
        await authenticator.authenticate(shown(GATEWAY, *both))


@pytest.mark.parametrize("value", ["alpha-of-the-herd", "Basic alpha-of-the-herd", "Bearer", "Bearer ", ""])
async def test_other_schemes(authenticator: Authenticator, value: str) -> None:
    with pytest.raises(Unauthenticated, match="Authorization: Bearer KEY"):
        await authenticator.authenticate(shown(authorization=value))


def test_secrets_are_not_in_what_may_be_logged(authenticator: Authenticator) -> None:
    assert "alpha-of-the-herd" not in repr(shown(None, bearer("alpha-of-the-herd"), x_api_key="alpha-of-the-herd"))


def test_who_acts_is_known_inside_and_forgotten_after() -> None:
    bob = Principal("team-b", "k", "key", frozenset({"infer"}))
    assert current_principal() is NOBODY and not NOBODY.scopes
    with acting_as(bob):
        assert current_principal() is bob
    assert current_principal() is NOBODY


@pytest.mark.parametrize(
    ("host", "content", "is_insecure", "is_fine"),
    [
        ("127.0.0.1", {}, False, True),
        ("::1", {}, False, True),
        ("0.0.0.0", {}, False, False),
        ("10.0.0.1", {}, False, False),
        ("10.0.0.1", {}, True, True),
        ("10.0.0.1", {"api_keys": {"file": "k"}}, False, True),
        ("10.0.0.1", {"tls": {"certificate_file": "c", "key_file": "k"}}, False, False),
    ],
)
def test_open_addresses(host: str, content: dict[str, Any], is_insecure: bool, is_fine: bool) -> None:
    config = SecurityConfig.model_validate(content)
    if is_fine:
        check_exposure(host, config, is_insecure)
        return
    with pytest.raises(InvalidOption, match="--api-key-file or --security-file"):
        check_exposure(host, config, is_insecure)


JWT = {"issuer": "i", "audience": "a", "jwks": "keys.json", "tenant_claim": "t"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold sections"),
        ("{", "is not YAML"),
        ("api_key: 1", "api_key: Extra inputs"),
        ("jwt: [{issuer: i, audience: a, jwks: 'http://x.test/k', tenant_claim: t}]", "must come over https"),
        ("jwt: [{issuer: i, audience: a, jwks: k, tenant_claim: t, algorithms: [HS256]}]", "jwt.0.algorithms.0"),
        ("jwt: [{issuer: i, audience: a, jwks: k, tenant_claim: t, algorithms: [none]}]", "jwt.0.algorithms.0"),
        ("jwt: [{issuer: i, audience: a, jwks: k, tenant_claim: t, scope_claim: s}]", "go together"),
        ("certificates: [{name: 'dns:a', tenant: t}]", "need tls with a client_ca_file"),
        ("certificates: [{name: a, tenant: t}]", "write uri:"),
        ("certificates: [{name: 'dns:a', tenant: 'a b'}]", "no tenant's name"),
        ("gateways: [{name: 'dns:a', scopes: [root]}]", "give some of"),
    ],
)
def test_security_files_that_say_nonsense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InvalidOption) as caught:
        load_security(tmp_path / "s.yaml", None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_paths_start_at_the_security_file(tmp_path: Path) -> None:
    text = "api_keys: {file: keys}\njwt: [{issuer: i, audience: a, jwks: sub/jwks.json, tenant_claim: t}]"
    (tmp_path / "s.yaml").write_text(text)
    config = load_security(tmp_path / "s.yaml", None)
    assert config.api_keys is not None and config.api_keys.file == tmp_path / "keys"
    assert config.jwt[0].jwks == str(tmp_path / "sub" / "jwks.json")
    with pytest.raises(InvalidOption, match="say the same"):
        load_security(tmp_path / "s.yaml", tmp_path / "other")


def test_both_are_options_of_serve() -> None:
    assert {"security_file", "insecure", "api_key_file"} <= ServeConfig.model_fields.keys()
