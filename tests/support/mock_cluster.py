"""A Kubernetes API server for pods that are acted out: the mock of tests/chart/api_server.py (kmock) with TLS at an
address of a host of its own, and what controllers would write there, written with the kubernetes package's client."""

import ctypes
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from kubernetes import client

from tests.chart.api_server import RunningServer, TlsEntry, running_server
from tests.chart.rendering import NAMESPACE, Document
from tests.identity.authority import Authority, write_pair
from tests.support.hosts.host import Host

KINDS = [
    {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"},
    {"apiVersion": "v1", "kind": "Node"},
]
TOKEN = "a-token-of-the-service-account"
PORT = 6443
_CLONE_NEWNET = 0x40000000


class MockCluster:
    """``host``: where pods reach it."""

    def __init__(self, host: Host, server: RunningServer, authority: Authority) -> None:
        self.host = host
        self.port = PORT
        self._server = server
        self._authority = authority
        calls = client.ApiClient(client.Configuration(host=server.url))
        self._slices, self._nodes = client.DiscoveryV1Api(calls), client.CoreV1Api(calls)

    def account(self) -> dict[str, bytes]:
        """The files of a service account."""
        return {"token": TOKEN.encode(), "ca.crt": self._authority.pem, "namespace": NAMESPACE.encode()}

    def asked(self) -> set[str]:
        """Paths that were read, and by nobody without the token."""
        assert self._server.api.tokens == {f"bearer {TOKEN}"}
        return {path for method, path in self._server.api.seen if method == "GET"}

    def make_slice(self, service: Document, pod: Document) -> None:
        """For ``service`` a slice without endpoints, of what ``pod`` listens at."""
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        numbers = {
            one["name"]: one["containerPort"] for container in pod["spec"]["containers"] for one in container["ports"]
        }
        ports = [
            {"name": wanted["name"], "port": numbers[wanted["targetPort"]], "protocol": "TCP"}
            for wanted in service["spec"]["ports"]
        ]
        self._slice = f"{service['metadata']['name']}-x7k2p"
        body: Any = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": self._slice,
                "labels": {"kubernetes.io/service-name": service["metadata"]["name"]},
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [],
        }
        self._slices.create_namespaced_endpoint_slice(NAMESPACE, body)

    def set_endpoints(self, *endpoints: dict[str, Any]) -> None:
        """As the EndpointSlice controller does: all that are there now."""
        self._slices.patch_namespaced_endpoint_slice(self._slice, NAMESPACE, {"endpoints": list(endpoints)})

    def make_node(self, name: str) -> None:
        self._nodes.create_node({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}})

    def patch_node(self, name: str, **spec: Any) -> None:
        """``unschedulable=True`` is what kubectl cordon does, ``unschedulable=None`` kubectl uncordon."""
        self._nodes.patch_node(name, {"spec": spec})


def endpoint(pod: str, host: Host, node: str = "node", *, is_ready: bool = True) -> dict[str, Any]:
    """An entry of a slice."""
    return {
        "addresses": [host.address],
        "conditions": {"ready": is_ready, "serving": is_ready, "terminating": False},
        "targetRef": {"kind": "Pod", "name": pod, "namespace": NAMESPACE},
        "nodeName": node,
    }


@contextmanager
def mock_cluster(host: Host, directory: Path) -> Iterator[MockCluster]:
    """For the time of the context. ``directory``: for its certificate."""
    authority = Authority("cluster")
    address = x509.IPAddress(ipaddress.ip_address(host.address))
    certificate, key = write_pair(directory, "api-server", authority.issue("kubernetes", address))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running_server(list(KINDS), entry=TlsEntry(_listener(host), context)) as server:
        yield MockCluster(host, server, authority)


def _listener(host: Host) -> socket.socket:
    """A socket that listens in the host's network: it stays there, whoever serves it."""
    made: list[socket.socket] = []

    def make() -> None:
        with host.network.open() as network:
            # Of this thread alone, which ends at once.
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        made.append(socket.create_server((host.address, PORT)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
