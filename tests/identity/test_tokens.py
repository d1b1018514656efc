"""Tokens made with the cryptography package, forged in the known ways, and their claims."""

import base64
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import PermissionDenied, Unauthenticated
from cluster.identity.config import JwtConfig
from cluster.identity.jwks import JwksCache
from cluster.identity.tokens import TokenVerifier, unverified_issuer
from engine.errors import RemudaError
from tests.identity.authority import Signer, b64, forged_with_hmac

NOW_S = 1_800_000_000
ISSUER = "https://issuer.test"


def signer(kid: str | None = "one", alg: str = "RS256") -> Signer:
    return _signer(kid, alg)


@cache
def _signer(kid: str | None, alg: str) -> Signer:
    return Signer(kid, alg)


def claims(**changes: Any) -> dict[str, Any]:
    values = {"iss": ISSUER, "aud": "remuda", "sub": "bob", "exp": NOW_S + 300, "tenant": "team-a", **changes}
    return {name: value for name, value in values.items() if value is not None}


def verifier(keys: list[dict[str, str]] | None = None, **changes: Any) -> TokenVerifier:
    config = JwtConfig.model_validate(
        {"issuer": ISSUER, "audience": "remuda", "jwks": "/none", "tenant_claim": "tenant", **changes}
    )
    content = json.dumps({"keys": keys if keys is not None else [signer().jwk, signer("two", "ES256").jwk]}).encode()

    async def fetch() -> bytes:
        return content

    return TokenVerifier(config, JwksCache(fetch, lambda: 0.0, 300.0, 10.0), lambda: NOW_S)


@pytest.mark.parametrize("signed_by", [("one", "RS256"), ("two", "ES256")])
async def test_a_good_token(signed_by: tuple[str, str]) -> None:
    found = await verifier().check(signer(*signed_by).token(claims()))
    assert (found.tenant, found.key_id, found.kind, found.scopes) == ("team-a", "jwt:bob", "jwt", {"infer"})


async def test_the_only_key_needs_no_id() -> None:
    only, other = signer(None), signer("two", "ES256")
    await verifier([only.jwk]).check(only.token(claims()))
    with pytest.raises(Unauthenticated, match="no such key"):
        await verifier([only.jwk, other.jwk]).check(only.token(claims()))


def unsigned(header: dict[str, Any]) -> str:
    return f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims()).encode())}."


def tampered() -> str:
    head, _, signature = signer().token(claims()).split(".")
    return f"{head}.{b64(json.dumps(claims(tenant='team-b')).encode())}.{signature}"


FORGERIES: dict[str, Callable[[], str]] = {
    "no signature": lambda: unsigned({"alg": "none", "kid": "one"}),
    "no signature, RS256": lambda: unsigned({"alg": "RS256", "kid": "one"}),
    "none in capitals": lambda: unsigned({"alg": "NoNe", "kid": "one"}),
    "public key as secret": lambda: forged_with_hmac(signer(), claims()),
    "other claims": tampered,
    "another's key of the same name": lambda: Signer("one").token(claims()),
    "an algorithm that is not allowed": lambda: signer().token(claims(), alg="RS512"),
    "RSA's name, the curve's key": lambda: signer("two", "ES256").token(claims(), alg="RS256"),
    "key in the token": lambda: Signer("three").token(claims(), jwk=signer("three").jwk),
    "keys at an address": lambda: Signer("three").token(claims(), jku="http://127.0.0.1:9/keys"),
    "crit that nobody knows": lambda: signer().token(claims(), crit=["x"], x=1),
    "no key of that name": lambda: signer().token(claims(), kid="zero"),
    "a name without end": lambda: signer().token(claims(), kid="k" * 1000),
    "a name that is none": lambda: signer().token(claims(), kid=["one"]),
    "an issuer that is another": lambda: signer().token(claims(iss="https://issuer.test.evil")),
    "no issuer": lambda: signer().token(claims(iss=None)),
    "an audience that is another": lambda: signer().token(claims(aud="other")),
    "no audience": lambda: signer().token(claims(aud=None)),
    "no end": lambda: signer().token(claims(exp=None)),
    "an end that is text": lambda: signer().token(claims(exp="never")),
    "no subject": lambda: signer().token(claims(sub=None)),
    "expired": lambda: signer().token(claims(exp=NOW_S - 31)),
    "not yet valid": lambda: signer().token(claims(nbf=NOW_S + 31)),
    "of the future": lambda: signer().token(claims(iat=NOW_S + 31)),
    "encrypted, in five parts": lambda: "a.b.c.d.e",
    "too long": lambda: signer().token(claims(x="x" * 20_000)),
    "deep": lambda: b64(b"[" * 10_000) + ".e30.e30",
    "nothing": lambda: "..",
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_forgeries(name: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await verifier().check(FORGERIES[name]())
    assert len(str(caught.value)) < 150


async def test_clocks_may_differ_by_the_leeway() -> None:
    for late in (claims(exp=NOW_S - 29), claims(nbf=NOW_S + 29), claims(iat=NOW_S + 29)):
        await verifier().check(signer().token(late))
    with pytest.raises(Unauthenticated, match="expired"):
        await verifier(leeway_s=0).check(signer().token(claims(exp=NOW_S)))


async def test_one_of_several_audiences() -> None:
    await verifier().check(signer().token(claims(aud=["other", "remuda"])))


async def test_algorithms_are_those_that_are_listed() -> None:
    only = verifier(algorithms=["ES256"])
    await only.check(signer("two", "ES256").token(claims()))
    with pytest.raises(Unauthenticated, match="signed with ES256"):
        await only.check(signer().token(claims()))


async def test_a_key_for_one_algorithm_checks_no_other() -> None:
    bound = {**signer().jwk, "alg": "PS256"}
    with pytest.raises(Unauthenticated, match="no such key"):
        await verifier([bound], algorithms=["RS256", "PS256"]).check(signer().token(claims()))


@pytest.mark.parametrize("named", [None, "", "a b", "x" * 65, ["team-a", "team-b"], 7, {"a": 1}])
async def test_tenants_that_are_none(named: Any) -> None:
    with pytest.raises(PermissionDenied, match="'tenant' names no tenant"):
        await verifier().check(signer().token(claims(tenant=named)))


async def test_groups_are_translated_and_no_others_let_in() -> None:
    mapped = verifier(tenant_claim="groups", tenants={"g1": "team-a", "g2": "team-b"})
    assert (await mapped.check(signer().token(claims(groups=["x", "g2"])))).tenant == "team-b"
    assert (await mapped.check(signer().token(claims(groups="g1")))).tenant == "team-a"
    with pytest.raises(PermissionDenied):
        await mapped.check(signer().token(claims(groups=["x", "team-a"])))


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("r.use r.ops", {"infer", "admin"}), (["r.ops"], {"admin"}), ("other", set()), (None, set()), (7, set())],
)
async def test_scopes(scope: Any, expected: set[str]) -> None:
    mapped = verifier(scope_claim="scp", scopes={"r.use": "infer", "r.ops": "admin"})
    assert (await mapped.check(signer().token(claims(scp=scope)))).scopes == expected


@given(st.one_of(st.text(), st.lists(st.binary(), min_size=3, max_size=3).map(lambda parts: ".".join(map(b64, parts)))))
async def test_no_text_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(RemudaError):
        await verifier().check(text)
    with pytest.raises(Unauthenticated):
        unverified_issuer(text)


async def test_every_changed_byte_is_seen() -> None:
    token, checks = signer().token(claims()), verifier()
    for index in range(0, len(token), 7):
        if token[index] == ".":
            continue
        changed = token[:index] + ("A" if token[index] != "A" else "B") + token[index + 1 :]
        with pytest.raises(Unauthenticated):
            await checks.check(changed)
    assert base64.urlsafe_b64decode(token.split(".")[1] + "==")
