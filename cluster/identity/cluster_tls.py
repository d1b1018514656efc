"""Mutual TLS between front ends and leaders: both show a certificate that the cluster's own authority signed."""

from pathlib import Path

import grpc
import msgspec

from cluster.identity.config import ClusterConfig
from cluster.identity.tls import ServerTls, client_credentials

CLUSTER_NAME = "remuda-cluster"
"""The DNS name in every such certificate. Leaders are on whatever hosts there are, so addresses prove nothing."""


class ClusterTls(msgspec.Struct, frozen=True):
    """Files, in PEM, at the same absolute paths on every host that has a front end or a leader."""

    certificate_file: str
    key_file: str
    ca_file: str

    @classmethod
    def of(cls, config: ClusterConfig | None) -> "ClusterTls | None":
        """Raises InvalidOption where the files of this host cannot be used."""
        if config is None:
            return None
        paths = [str(path.absolute()) for path in (config.certificate_file, config.key_file, config.ca_file)]
        tls = cls(*paths)
        tls.server_credentials()
        return tls

    def server_credentials(self) -> grpc.ServerCredentials:
        """A leader's; its files are looked at for each new connection. Raises InvalidOption."""
        tls = ServerTls(Path(self.certificate_file), Path(self.key_file), Path(self.ca_file))
        return tls.grpc_credentials(polls=True)

    def client_credentials(self) -> grpc.ChannelCredentials:
        """A front end's, as its files are now. Raises InvalidOption."""
        return client_credentials(Path(self.ca_file), Path(self.certificate_file), Path(self.key_file))
