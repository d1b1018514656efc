"""Certificates and tokens for tests, made with the cryptography package alone: nothing of ours, nothing of joserfc."""

import base64
import datetime
import hashlib
import hmac
import ipaddress
import json
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


class Authority:
    """Signs certificates, and has one of its own."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(PEM)

    def issue(self, common_name: str, *names: x509.GeneralName) -> tuple[bytes, bytes]:
        """Certificate and key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]), key)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(PEM), secret

    def issue_for_host(self, common_name: str = "server") -> tuple[bytes, bytes]:
        """For a server at 127.0.0.1."""
        return self.issue(common_name, x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


def write_pair(directory: Path, stem: str, pair: tuple[bytes, bytes]) -> tuple[Path, Path]:
    """As STEM.crt and STEM.key."""
    certificate, key = directory / f"{stem}.crt", directory / f"{stem}.key"
    certificate.write_bytes(pair[0])
    key.write_bytes(pair[1])
    key.chmod(0o600)
    return certificate, key


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


class Signer:
    """A key of an issuer, RSA or (``alg`` ES256) elliptic."""

    def __init__(self, kid: str | None, alg: str = "RS256") -> None:
        self.kid, self.alg = kid, alg
        self._rsa = rsa.generate_private_key(65537, 2048) if alg.startswith("RS") else None
        self._ec = None if self._rsa else ec.generate_private_key(ec.SECP256R1())

    @property
    def jwk(self) -> dict[str, str]:
        named = {} if self.kid is None else {"kid": self.kid}
        if self._rsa is not None:
            numbers = self._rsa.public_key().public_numbers()
            return {"kty": "RSA", "use": "sig", "n": _number(numbers.n), "e": _number(numbers.e), **named}
        assert self._ec is not None
        point = self._ec.public_key().public_numbers()
        x, y = b64(point.x.to_bytes(32, "big")), b64(point.y.to_bytes(32, "big"))
        return {"kty": "EC", "crv": "P-256", "x": x, "y": y, **named}

    @property
    def public_pem(self) -> bytes:
        key = self._rsa or self._ec
        assert key is not None
        return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def token(self, claims: dict[str, Any], **header: Any) -> str:
        """``header``: beside or instead of alg and kid; None leaves one out."""
        fields = {"alg": self.alg, "typ": "JWT", "kid": self.kid, **header}
        head = {name: value for name, value in fields.items() if value is not None}
        text = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
        return f"{text}.{b64(self._signature(text.encode()))}"

    def _signature(self, data: bytes) -> bytes:
        if self._rsa is not None:
            return self._rsa.sign(data, padding.PKCS1v15(), hashes.SHA256())
        assert self._ec is not None
        r, s = utils.decode_dss_signature(self._ec.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def forged_with_hmac(signer: Signer, claims: dict[str, Any]) -> str:
    """Signed with the issuer's public key as if it were a shared secret."""
    head = {"alg": "HS256", "typ": "JWT", "kid": signer.kid}
    text = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{text}.{b64(hmac.digest(signer.public_pem, text.encode(), hashlib.sha256))}"
