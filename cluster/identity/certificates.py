"""The names that an X.509 certificate gives its holder, from the certificate itself or from a gateway's header.

Each name has its kind in front, so that a DNS name can never pass for a URI: ``uri:spiffe://corp/team``,
``dns:client.corp``, ``subject:CN=client,O=Corp`` (RFC 4514).
"""

import functools
import re

from cryptography import x509

_MAX_HEADER_CHARS = 32 << 10
_FIELD = re.compile(r'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^";,]*)')
"""As Envoy documents it: KEY=VALUE;KEY="VALUE",KEY=…, with backslashes before quotation marks."""
_KINDS = {"uri": "uri", "dns": "dns", "subject": "subject"}


@functools.lru_cache(maxsize=1024)
def names_of(certificate: bytes) -> tuple[str, ...]:
    """The names in a DER certificate, alternative names first. Empty where it cannot be read."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        names: list[str] = []
        for extension in parsed.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                names += [f"uri:{uri}" for uri in extension.value.get_values_for_type(x509.UniformResourceIdentifier)]
                names += [f"dns:{name.lower()}" for name in extension.value.get_values_for_type(x509.DNSName)]
        subject = parsed.subject.rfc4514_string()
    except ValueError:
        return ()
    return (*names, f"subject:{subject}") if subject else tuple(names)


def forwarded_names(header: str) -> tuple[str, ...]:
    """Of the client of the proxy that wrote the last element of ``x-forwarded-client-cert``; empty for any other form.

    Earlier elements were written by proxies before it, or by whoever called those.
    """
    if len(header) > _MAX_HEADER_CHARS:
        return ()
    elements = _elements(header)
    if not elements:
        return ()
    names = []
    for key, value in elements[-1]:
        kind = _KINDS.get(key.lower())
        if kind is not None and value:
            names.append(f"{kind}:{value.lower() if kind == 'dns' else value}")
    return tuple(names)


def _elements(header: str) -> list[list[tuple[str, str]]]:
    elements: list[list[tuple[str, str]]] = [[]]
    position = 0
    while position < len(header):
        match = _FIELD.match(header, position)
        if match is None:
            return []
        elements[-1].append((match[1], _unquoted(match[2])))
        position = match.end()
        if position == len(header):
            break
        if header[position] == ",":
            elements.append([])
        elif header[position] != ";":
            return []
        position += 1
    return elements


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
