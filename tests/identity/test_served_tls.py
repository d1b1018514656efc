"""TLS and client certificates at a running front end, over HTTP and gRPC, and their rotation."""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.frontend.http_protocol import HttpLimits
from cluster.identity.config import SecurityConfig
from cluster.identity.tls import ServerTls
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from engine.errors import InvalidOption
from tests.frontend.scripted import says
from tests.frontend.servers import Served, served
from tests.identity.authority import Authority, write_pair

GATEWAY, CLIENT = "spiffe://corp/gateway", "spiffe://corp/client"
NOT_TRUSTED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)


class Place:
    """The files of one server and of its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.servers, self.clients = Authority("servers"), Authority("clients")
        self.renew_server()
        self.path("clients.pem").write_bytes(self.clients.pem)
        self.path("servers.pem").write_bytes(self.servers.pem)
        for stem, uri in (("client", CLIENT), ("gateway", GATEWAY), ("stranger", "spiffe://corp/stranger")):
            self.issue(stem, uri)

    def path(self, name: str) -> Path:
        return self.directory / name

    def renew_server(self, name: str = "server") -> None:
        write_pair(self.directory, "server", self.servers.issue_for_host(name))

    def issue(self, stem: str, uri: str) -> None:
        pair = self.clients.issue("any", x509.UniformResourceIdentifier(uri))
        write_pair(self.directory, stem, pair)
        self.path(f"{stem}.pem").write_bytes(b"".join(pair))

    def security(self, *, mutual: bool = True, **more: Any) -> SecurityConfig:
        tls: dict[str, Any] = {"certificate_file": self.path("server.crt"), "key_file": self.path("server.key")}
        if mutual:
            tls.update(client_ca_file=self.path("clients.pem"), health_port=0)
            client = {"name": f"uri:{CLIENT}", "tenant": "team-c", "scopes": ["infer", "admin"]}
            more.setdefault("certificates", [client])
            more.setdefault("gateways", [{"name": f"uri:{GATEWAY}"}])
        return SecurityConfig.model_validate({"tls": tls, **more})

    def context(self, stem: str | None, **settings: Any) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.path("servers.pem"))
        if stem is not None:
            context.load_cert_chain(self.path(f"{stem}.crt"), self.path(f"{stem}.key"))
        for name, value in settings.items():
            setattr(context, name, value)
        return context

    def http(self, one: Served, stem: str | None, **settings: Any) -> httpx.AsyncClient:
        url = f"https://127.0.0.1:{one.front_end.port}"
        context = self.context(stem, **settings)
        return httpx.AsyncClient(base_url=url, verify=context, trust_env=False, timeout=10)

    def channel(self, one: Served, stem: str | None) -> grpc.aio.Channel:
        pair = (None, None)
        if stem is not None:
            pair = self.path(f"{stem}.key").read_bytes(), self.path(f"{stem}.crt").read_bytes()
        credentials = grpc.ssl_channel_credentials(self.path("servers.pem").read_bytes(), *pair)
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{one.front_end.grpc_port}", credentials, options=options)

    async def http_status(self, one: Served, stem: str | None, **headers: str) -> int | None:
        """None: the handshake failed."""
        async with self.http(one, stem) as client:
            try:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return (await client.get("/v1/models", headers=named)).status_code
            except NOT_TRUSTED:
                return None

    async def rpc_code(self, one: Served, stem: str | None, *metadata: tuple[str, str]) -> grpc.StatusCode:
        async with self.channel(one, stem) as channel:
            try:
                stub = inference_pb2_grpc.InferenceStub(channel)
                await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=10)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@asynccontextmanager
async def guarded(security: SecurityConfig, **changes: Any) -> AsyncIterator[Served]:
    async with served(says([300]), security=security, **changes) as one:
        yield one


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within_s
        await asyncio.sleep(0.05)


async def test_tls_without_client_certificates(place: Place) -> None:
    place.path("keys").write_text("alpha-of-the-herd\n")
    security = place.security(mutual=False, api_keys={"file": place.path("keys")})
    async with guarded(security) as one:
        assert await place.http_status(one, None) == 401
        assert await place.http_status(one, None, authorization="Bearer alpha-of-the-herd") == 200
        assert await place.rpc_code(one, None) == grpc.StatusCode.UNAUTHENTICATED
        assert await place.rpc_code(one, None, ("authorization", "Bearer alpha-of-the-herd")) == grpc.StatusCode.OK
        async with place.http(one, None, maximum_version=ssl.TLSVersion.TLSv1_2) as client:
            assert (await client.get("/livez")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await one.http.get("/livez")  # in plain text


async def test_client_certificates_are_identities(place: Place) -> None:
    unknown, unavailable = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE
    async with guarded(place.security()) as one:
        found = {stem: await place.http_status(one, stem) for stem in ("client", "stranger", "gateway", None)}
        assert found == {"client": 200, "stranger": 401, "gateway": 401, None: None}
        codes = {stem: await place.rpc_code(one, stem) for stem in ("client", "stranger", "gateway", None)}
        assert codes == {"client": grpc.StatusCode.OK, "stranger": unknown, "gateway": unknown, None: unavailable}


async def test_certificates_of_another_authority_end_in_the_handshake(place: Place) -> None:
    async with guarded(place.security()) as one:
        place.clients = Authority("clients")
        place.issue("client", CLIENT)
        assert await place.http_status(one, "client") is None
        assert await place.rpc_code(one, "client") == grpc.StatusCode.UNAVAILABLE


async def test_only_the_gateway_may_say_who_it_is_for(place: Place) -> None:
    spoofed = {"x_remuda_tenant": "team-g", "x_forwarded_client_cert": f"URI={CLIENT}"}
    pairs = tuple((name.replace("_", "-"), value) for name, value in spoofed.items())
    async with guarded(place.security()) as one:
        assert await place.http_status(one, "gateway", **spoofed) == 200
        assert await place.http_status(one, "stranger", **spoofed) == 401
        assert await place.rpc_code(one, "gateway", *pairs) == grpc.StatusCode.OK
        assert await place.rpc_code(one, "stranger", *pairs) == grpc.StatusCode.UNAUTHENTICATED


async def test_probes_have_a_plain_port_of_their_own(place: Place) -> None:
    async with guarded(place.security()) as one, httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{one.front_end.health_port}"
        for path in ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"):
            assert (await client.get(url + path)).status_code == 200
        for path in ("/v1/models", "/metrics", "/"):
            answer = await client.get(url + path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


async def presented(place: Place, one: Served, port: int) -> bytes:
    """The certificate that a new connection gets, DER."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=place.context("client"))
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    assert isinstance(certificate, bytes)
    return certificate


async def test_a_renewed_certificate_is_shown_without_a_restart(place: Place) -> None:
    async with guarded(place.security()) as one, place.http(one, "client") as kept:
        ports = (one.front_end.port, one.front_end.grpc_port)
        before = [await presented(place, one, port) for port in ports]
        assert before[0] == before[1] and (await kept.get("/v1/models")).status_code == 200
        place.renew_server("renewed")

        async def is_new() -> bool:
            return all([await presented(place, one, port) != before[0] for port in ports])

        await until(is_new)
        assert await place.rpc_code(one, "client") == grpc.StatusCode.OK
        assert (await kept.get("/v1/models")).status_code == 200, "connections that are open stay"


async def test_half_a_rotation_changes_nothing(place: Place) -> None:
    tls = ServerTls(place.path("server.crt"), place.path("server.key"), place.path("clients.pem"))
    other, key = place.servers.issue_for_host()
    place.path("server.crt").write_bytes(other)
    assert not tls.poll()
    place.path("server.key").write_bytes(key)
    assert tls.poll() and not tls.poll()


@pytest.mark.parametrize("broken", ["server.crt", "server.key", "clients.pem"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense\xff"])
def test_files_that_cannot_be_used(place: Place, broken: str, content: bytes | None) -> None:
    path = place.path(broken)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InvalidOption) as caught:
        ServerTls(place.path("server.crt"), place.path("server.key"), place.path("clients.pem"))
    assert str(path) in str(caught.value)


async def test_an_authority_that_is_withdrawn_lets_nobody_in_again(place: Place) -> None:
    """Not even over a session that a client keeps from before."""
    async with guarded(place.security()) as one:
        context, port = place.context("client"), one.front_end.port

        def connect(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
            """Raises OSError."""
            with (
                socket.create_connection(("127.0.0.1", port), 5) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as connection,
            ):
                connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                if not connection.recv(100).startswith(b"HTTP/1.1 200"):
                    raise ConnectionError("refused")
                return connection.session

        session = await asyncio.to_thread(connect, None)
        old = place.clients
        place.clients = Authority("clients")
        place.path("clients.pem").write_bytes(place.clients.pem)

        async def is_refused() -> bool:
            return await place.http_status(one, "client") is None

        await until(is_refused)
        with pytest.raises(OSError):
            await asyncio.to_thread(connect, session)
        assert await place.rpc_code(one, "client") == grpc.StatusCode.UNAVAILABLE
        place.issue("client", CLIENT)
        assert await place.http_status(one, "client") == 200 and old is not place.clients
        assert await place.rpc_code(one, "client") == grpc.StatusCode.OK


async def test_a_handshake_has_its_time(place: Place) -> None:
    limits = HttpLimits(head_s=0.3)
    async with guarded(place.security(), http_limits=limits) as one:
        for start in (b"", b"\x16\x03\x01\x02\x00\x01"):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.front_end.port)
            writer.write(start)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(reader.readexactly(1 << 20), 5)
            writer.close()
        assert await place.http_status(one, "client") == 200


async def test_the_command_line_speaks_tls(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "GRPC_VERBOSITY": "NONE"})
    async with guarded(place.security()) as one:
        target = f"127.0.0.1:{one.front_end.grpc_port}"
        arguments = ["status", "--json", "--target", target, "--ca-file", str(place.path("servers.pem"))]
        own = ["--certificate-file", str(place.path("client.pem"))]
        answer = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *own])
        assert answer.exit_code == 0 and '"model": "m"' in answer.stdout
        refused = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert refused.exit_code == 1
