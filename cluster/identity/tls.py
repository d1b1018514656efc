"""Certificates of servers and clients, read again when they change, for HTTP (ssl) and gRPC alike."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.identity.config import TlsConfig
from cluster.identity.reloaded import Reloaded, read_file, warn_if_readable_by_all
from engine.errors import InvalidOption


@dataclass(frozen=True)
class _Bundle:
    context: ssl.SSLContext
    grpc_configuration: grpc.ServerCertificateConfiguration


class ServerTls:
    """A server's certificate and key, and the authority that its clients' certificates must come from.

    Args:
        certificate_file: PEM, the chain.
        key_file: PEM, its private key, without a password.
        client_ca_file: PEM; None: clients need no certificate.

    Raises:
        InvalidOption: files that cannot be read or do not belong together.
    """

    def __init__(self, certificate_file: Path, key_file: Path, client_ca_file: Path | None = None) -> None:
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        warn_if_readable_by_all(key_file, "the private key")
        paths = [path for path in (certificate_file, key_file, client_ca_file) if path is not None]
        self._bundle = Reloaded(paths, self._load)

    def poll(self) -> bool:
        """Whether new connections get something new from now on. Blocks on the file system."""
        return self._bundle.poll()

    def http_context(self) -> ssl.SSLContext:
        """For a server of HTTP/1.1. Each handshake takes what was read last."""
        outer = self._load().context

        def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._bundle.value.context

        outer.sni_callback = choose
        return outer

    def grpc_credentials(self, *, polls: bool = False) -> grpc.ServerCredentials:
        """For a gRPC server. Each handshake takes what was read last; ``polls``: after a look at the files."""
        given = self._bundle.value.grpc_configuration

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """None while there is nothing new: where gRPC 1.85 replaces what its handshakes use while others of them
            run, even with the same again, a few thousand connections end the process with SIGSEGV."""
            nonlocal given
            if polls:
                self.poll()
            before, given = given, self._bundle.value.grpc_configuration
            return None if given is before else given

        return grpc.dynamic_ssl_server_credentials(
            given,
            changed,  # type: ignore[arg-type]  # None is what gRPC's manual asks for; its types leave it out
            require_client_authentication=self._client_ca_file is not None,
        )

    def _load(self) -> _Bundle:
        certificate, key = read_file(self._certificate_file, "the certificate"), read_file(self._key_file, "the key")
        authority = None if self._client_ca_file is None else read_file(self._client_ca_file, "the clients' CA")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        try:
            context.load_cert_chain(self._certificate_file, self._key_file, password=_no_password)
            if authority is not None:
                context.load_verify_locations(cadata=authority.decode("ascii"))
                context.verify_mode = ssl.CERT_REQUIRED
                # A session that is resumed would not show its client's certificate to a new authority. TLS 1.3 has
                # tickets for that only, and gets none.
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.num_tickets = 0
        except (ssl.SSLError, OSError, ValueError) as error:
            names = f"{self._certificate_file} and {self._key_file}"
            if self._client_ca_file is not None:
                names += f" with {self._client_ca_file}"
            raise InvalidOption(f"{names} cannot be used for TLS: {getattr(error, 'reason', None) or error}") from None
        return _Bundle(context, grpc.ssl_server_certificate_configuration([(key, certificate)], authority))


def client_credentials(
    ca_file: Path, certificate_file: Path | None = None, key_file: Path | None = None
) -> grpc.ChannelCredentials:
    """For a gRPC client. ``ca_file``: who signed the server's certificate. One file may have certificate and key.

    Raises InvalidOption.
    """
    authority = read_file(ca_file, "the CA file")
    if certificate_file is None or key_file is None:
        return grpc.ssl_channel_credentials(authority)
    certificate, key = read_file(certificate_file, "the certificate"), read_file(key_file, "the key")
    return grpc.ssl_channel_credentials(authority, key, certificate)


def make_server_tls(config: TlsConfig | None) -> ServerTls | None:
    """Raises InvalidOption."""
    if config is None:
        return None
    return ServerTls(config.certificate_file, config.key_file, config.client_ca_file)


def _no_password() -> str:
    raise ValueError("its key has a password; give a key without one, in a file that only this user can read")
