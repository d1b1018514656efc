"""Names of certificates, from the certificate and from a proxy's header."""

import ssl

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from cluster.identity.certificates import forwarded_names, names_of
from tests.identity.authority import Authority

URI = "spiffe://corp/team-a"


def test_every_kind_of_name() -> None:
    pem, _ = Authority().issue(
        "a, client", x509.UniformResourceIdentifier(URI), x509.DNSName("Client.Corp"), x509.RFC822Name("a@corp")
    )
    names = names_of(ssl.PEM_cert_to_DER_cert(pem.decode()))
    assert names == (f"uri:{URI}", "dns:client.corp", "subject:CN=a\\, client")


def test_a_subject_cannot_pass_for_another_kind() -> None:
    pem, _ = Authority().issue(f"uri:{URI}", x509.DNSName(f"uri:{URI}"))
    assert names_of(ssl.PEM_cert_to_DER_cert(pem.decode())) == (f"dns:uri:{URI}", f"subject:CN=uri:{URI}")


@given(st.binary(max_size=200))
def test_what_is_no_certificate_has_no_names(data: bytes) -> None:
    assert names_of(data) == ()


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (f"By=spiffe://gw;Hash=ab;URI={URI}", (f"uri:{URI}",)),
        ('Hash=ab;Subject="CN=x,O=\\"Corp\\"";URI=u;DNS=A.Corp', ('subject:CN=x,O="Corp"', "uri:u", "dns:a.corp")),
        ("URI=spiffe://spoofed,Hash=ab;URI=spiffe://near", ("uri:spiffe://near",)),
        ("URI=spiffe://spoofed,Hash=ab", ()),
        ('Subject="CN=x;URI=spiffe://spoofed,URI=spiffe://spoofed"', ("subject:CN=x;URI=spiffe://spoofed,URI=spiffe://spoofed",)),
        ("URI=", ()),
        ("", ()),
        ("nonsense", ()),
        ('Subject="never closed', ()),
        ('URI="a"b', ()),
        ("URI=a;" + "x" * 40_000, ()),
    ],
)  # fmt: skip
def test_the_nearest_proxys_client_counts(header: str, names: tuple[str, ...]) -> None:
    assert forwarded_names(header) == names


@given(st.text(alphabet='URIDNSubject=;,"\\ab', max_size=60))
def test_no_header_is_an_error_of_ours(header: str) -> None:
    assert all(name.partition(":")[0] in ("uri", "dns", "subject") for name in forwarded_names(header))
