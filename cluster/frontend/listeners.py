"""The two servers of one process: uvicorn for HTTP, grpc.aio for gRPC."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from cluster.frontend.grpc_admin import AdminServicer
from cluster.frontend.grpc_gate import GrpcGate
from cluster.frontend.grpc_limits import GrpcLimits
from cluster.frontend.grpc_service import InferenceServicer
from cluster.frontend.http_protocol import HttpLimits, LimitedHttp, limited_http
from cluster.frontend.vllm_grpc.servicer import VllmServicer
from cluster.identity.tls import ServerTls
from cluster.rpc.aio_server import make_server
from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from cluster.rpc.generated.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from cluster.rpc.health import Health, add_health_and_reflection
from engine.errors import InvalidOption

_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,
)


class _DatedState(ServerState):
    """What connections share, with a date that is made when one answers."""

    _date: tuple[int, bytes] = 0, b""

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        now_s = int(time.time())
        if now_s != self._date[0]:
            self._date = now_s, formatdate(now_s, usegmt=True).encode()
        return [(b"date", self._date[1])]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        assert not headers, "headers of all answers belong into the application"


class _Uvicorn(uvicorn.Server):
    """Signals are the process's business, not the server's; one can wait until it listens; and while nobody asks it
    anything it does not wake (uvicorn's own loop looks ten times a second whether it shall end, and what time it is).
    """

    def __init__(self, config: uvicorn.Config, handshake_s: float) -> None:
        super().__init__(config)
        self._handshake_s = handshake_s
        self.server_state = _DatedState()
        self.listening = asyncio.Event()
        self._ending = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self._ending.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for sockets that are open already, but that a handshake does not get a minute."""
        config = self.config

        def connection() -> asyncio.Protocol:
            protocol = cast(type[LimitedHttp], config.http_protocol_class)
            return protocol(config=config, server_state=self.server_state, app_state={})

        within_s = None if config.ssl is None else self._handshake_s
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                connection, sock=one, ssl=config.ssl, ssl_handshake_timeout=within_s, backlog=config.backlog
            )
            for one in sockets or ()
        ]
        self.started = True
        self.listening.set()


class HttpListener:
    """Args:
    app: the ASGI application.
    host: an address of this machine, or a name for one.
    port: 0 takes a free one.
    limits: of the connections.
    tls: None: plain text.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        limits: HttpLimits,
        tls: ServerTls | None = None,
        option: str = "--port",
    ) -> None:
        self._socket = _bound_socket(host, port, option)
        config = uvicorn.Config(
            app,
            http=limited_http(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            # It warns of each broken request: strangers could fill the log.
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            ssl_context_factory=None if tls is None else lambda config, default: tls.http_context(),
        )
        self._server = _Uvicorn(config, limits.head_s)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    async def start(self) -> None:
        """Returns when connections are taken."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()
            raise AssertionError("uvicorn ended while it started")

    async def stop(self) -> None:
        """Connections that are still busy a second later are cut."""
        self._server.end()
        if self._task is not None:
            await self._task
        self.close()

    def close(self) -> None:
        """Gives the port back; for a listener that was never started."""
        self._socket.close()


class GrpcListener:
    """Args:
    inference: for clients.
    admin: for operators.
    vllm: for routers that know vLLM.
    gate: around every method.
    host: as above.
    port: 0 takes a free one.
    limits: of the connections.
    tls: None: plain text.
    """

    def __init__(
        self,
        inference: InferenceServicer,
        admin: AdminServicer,
        vllm: VllmServicer,
        gate: GrpcGate,
        host: str,
        port: int,
        limits: GrpcLimits,
        tls: ServerTls | None = None,
    ) -> None:
        self._server = make_server(options=limits.options(), interceptors=[gate])
        self._health: Health | None = None
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, self._server)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(vllm, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, tls.grpc_credentials())
        except RuntimeError as error:
            raise InvalidOption(f"--grpc-port {port}: cannot listen at {address}; choose another port") from error
        self._is_ready: bool | None = None

    async def start(self) -> None:
        self._health = await add_health_and_reflection(self._server, _SERVICES)
        await self._server.start()

    async def set_ready(self, is_ready: bool) -> None:
        """What grpc.health.v1 answers."""
        assert self._health is not None, "start comes first"
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            await self._health.set_serving(is_ready)

    async def stop(self) -> None:
        """Calls that still run a second later are cut."""
        await self._server.stop(1.0)


def _bound_socket(host: str, port: int, option: str) -> socket.socket:
    """Raises InvalidOption where the address is not of this machine or the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidOption(f"--host {host} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InvalidOption(f"{option} {port}: cannot listen at {host}: {error.strerror}; choose another") from error
    listener.setblocking(False)
    return listener
