"""``remuda serve`` with everything on: certificates at both ports, probes apart, and TLS inside the cluster."""

import json
import ssl
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.identity.cluster_tls import CLUSTER_NAME
from tests.identity.authority import Authority, write_pair
from tests.support.served import Secured, free_port, run_remuda

CLIENT = "spiffe://corp/client"


def security_file(directory: Path, probes_port: int) -> Path:
    servers, clients, inside = Authority("servers"), Authority("clients"), Authority("cluster")
    for stem, authority in (("servers-ca", servers), ("clients-ca", clients), ("cluster-ca", inside)):
        (directory / f"{stem}.crt").write_bytes(authority.pem)
    write_pair(directory, "server", servers.issue_for_host())
    write_pair(directory, "member", inside.issue("host", x509.DNSName(CLUSTER_NAME)))
    pair = clients.issue("client", x509.UniformResourceIdentifier(CLIENT))
    write_pair(directory, "client", pair)
    (directory / "client.pem").write_bytes(b"".join(pair))
    path = directory / "security.yaml"
    path.write_text(
        f"tls: {{certificate_file: server.crt, key_file: server.key, client_ca_file: clients-ca.crt, "
        f"health_port: {probes_port}}}\n"
        f"certificates: [{{name: 'uri:{CLIENT}', tenant: team-c, scopes: [infer, admin]}}]\n"
        "cluster: {certificate_file: member.crt, key_file: member.key, ca_file: cluster-ca.crt}\n"
    )
    return path


@pytest.mark.full
def test_everything_at_once(tmp_path: Path) -> None:
    probes_port = free_port()
    path = security_file(tmp_path, probes_port)
    one = Secured(("remuda-tiny", "--security-file", str(path)), tmp_path / "serve.log")
    one.probes_port = probes_port
    with one:
        context = ssl.create_default_context(cafile=tmp_path / "servers-ca.crt")
        body = {"model": "remuda-tiny", "prompt": "The herd", "max_tokens": 4}
        url = f"https://127.0.0.1:{one.port}"
        with httpx.Client(base_url=url, verify=context, trust_env=False) as stranger, pytest.raises(httpx.HTTPError):
            stranger.post("/v1/completions", json=body)
        context.load_cert_chain(tmp_path / "client.crt", tmp_path / "client.key")
        with httpx.Client(base_url=url, verify=context, trust_env=False) as client:
            answer = client.post("/v1/completions", json=body, timeout=30)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
            assert client.get("/metrics").status_code == 403
        tls = ["--target", one.target, "--ca-file", str(tmp_path / "servers-ca.crt")]
        tls += ["--certificate-file", str(tmp_path / "client.pem")]
        status = run_remuda("status", "--json", *tls)
        assert status.returncode == 0, status.stderr
        leader = json.loads(status.stdout)["replicas"][0]["address"]
        with grpc.insecure_channel(leader) as channel, pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        member = [(tmp_path / name).read_bytes() for name in ("cluster-ca.crt", "member.key", "member.crt")]
        options = [("grpc.ssl_target_name_override", CLUSTER_NAME)]
        with grpc.secure_channel(leader, grpc.ssl_channel_credentials(*member), options=options) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    assert "PRIVATE KEY" not in (tmp_path / "serve.log").read_text()
    assert one.left_processes() == []
