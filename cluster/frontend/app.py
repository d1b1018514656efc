"""The front end as a whole: built from one configuration, started and stopped as one."""

import asyncio
import importlib.metadata
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.types import ASGIApp

from cluster.config import is_loopback
from cluster.errors import Draining
from cluster.frontend.adapters import Adapters
from cluster.frontend.admission import Admission
from cluster.frontend.answers import HttpSettings
from cluster.frontend.backend import Backend
from cluster.frontend.calls import TimeLimits
from cluster.frontend.clock import LoopClock
from cluster.frontend.encoding import PromptEncoder
from cluster.frontend.grpc_admin import AdminServicer
from cluster.frontend.grpc_gate import GrpcGate
from cluster.frontend.grpc_limits import GrpcLimits
from cluster.frontend.grpc_service import InferenceServicer
from cluster.frontend.health import Health
from cluster.frontend.http import build_health_app, build_http_app
from cluster.frontend.http_protocol import HttpLimits
from cluster.frontend.listeners import GrpcListener, HttpListener
from cluster.frontend.metrics import Metrics
from cluster.frontend.model_files import read_model_files
from cluster.frontend.service import Service
from cluster.frontend.tokenizer import Tokenizer
from cluster.frontend.vllm_grpc.servicer import VllmServicer
from cluster.identity.authenticator import make_authenticator
from cluster.identity.config import SecurityConfig, check_exposure
from cluster.identity.tls import make_server_tls
from cluster.telemetry.tracing import Telemetry
from cluster.tenants.tenancy import Tenancy, TenancyConfig
from engine.config import GrammarBackend, LoraConfig
from engine.errors import InvalidOption, RemudaError
from engine.request import Pooling

_log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 1.0
"""Between two looks at health, at limits, and at the files of keys, certificates and tenants: one wake-up for all."""
_LAST_WORDS_S = 1.0
"""For telling those who are cut off that they are."""

_LIMITS = TimeLimits(total_s=600.0, queue_s=60.0, first_token_s=120.0)


@dataclass(frozen=True)
class FrontEndConfig:
    """``model_path`` has the checkpoint's tokenizer and small JSON files. Port 0 takes a free one. ``stall_s``: work
    without a finished step for so long is a stall. ``max_live_sequences`` bounds choices, not requests. ``lora_dir``:
    clients may have adapters below it loaded; None: none at all. ``insecure``: strangers may use an open address.
    ``pooling``: what embeddings are made of. ``guided_decoding_backend``: what follows grammars on the replicas.
    """

    name: str
    model_path: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    security: SecurityConfig = field(default_factory=SecurityConfig)
    insecure: bool = False
    tenancy: TenancyConfig = field(default_factory=TenancyConfig)
    limits: TimeLimits = _LIMITS
    pooling: Pooling = Pooling.LAST
    guided_decoding_backend: GrammarBackend = GrammarBackend.LLGUIDANCE
    max_live_sequences: int = 1024
    stall_s: float = 60.0
    lora_dir: Path | None = None
    max_lora_rank: int = LoraConfig.max_rank
    http: HttpSettings = field(default_factory=HttpSettings)
    http_limits: HttpLimits = field(default_factory=HttpLimits)
    grpc_limits: GrpcLimits = field(default_factory=GrpcLimits)


class FrontEnd:
    """Everything is checked and all ports are taken here, before the model is ready to answer.

    Args:
        config: what to serve, where and within which bounds.
        backend: the replicas. Whoever made it closes it, after ``stop``.
        telemetry: where spans go; closed by ``stop``.

    Raises:
        InvalidOption: a port that is taken, keys or certificates that cannot be used, an open address that nothing
            guards.
        CheckpointError: the checkpoint's tokenizer cannot be used.
    """

    def __init__(self, config: FrontEndConfig, backend: Backend, telemetry: Telemetry | None = None) -> None:
        self._config = config
        self._telemetry = telemetry or Telemetry()
        check_exposure(config.host, config.security, config.insecure)
        self._authenticator = make_authenticator(config.security, time.time, time.monotonic, secrets.token_bytes)
        self._tls = make_server_tls(config.security.tls)
        files = read_model_files(config.model_path)
        clock = LoopClock()
        self._encoder = PromptEncoder(Tokenizer(files), files.vocab_size, config.guided_decoding_backend)
        self._admission = Admission(config.max_live_sequences)
        metrics = Metrics(config.name, backend.replicas)
        metrics.watch_live(lambda: self._admission.num_requests)
        adapters = Adapters(config.name, backend, config.lora_dir, config.max_lora_rank)
        self._tenancy = Tenancy(config.tenancy, metrics.registry)
        self.service = Service(
            config.name,
            files,
            self._encoder,
            backend,
            self._admission,
            metrics,
            clock,
            config.limits,
            adapters=adapters,
            tenancy=self._tenancy,
            tracer=self._telemetry.tracer,
            pooling=config.pooling,
        )
        self.health = Health(backend.replicas, lambda: self._admission.is_closed, clock, config.stall_s)
        tracer = self._telemetry.tracer
        is_own = self._authenticator.is_open and is_loopback(config.host)
        http_app = build_http_app(self.service, self.health, metrics, self._authenticator, config.http, tracer, is_own)
        self._listen(config, http_app)
        self._has_files = config.security != SecurityConfig() or config.tenancy.tenants_file is not None
        self._watchers: list[asyncio.Task[None]] = []
        # Its own: no work of clients comes between a key's revocation and its end.
        self._files_thread = ThreadPoolExecutor(1, thread_name_prefix="files")

    def _listen(self, config: FrontEndConfig, http_app: ASGIApp) -> None:
        """Takes all ports, or none. Raises InvalidOption."""
        version = importlib.metadata.version("remuda")
        inference, admin = InferenceServicer(self.service), AdminServicer(self.service, version)
        vllm = VllmServicer(self.service, self.health.ready, version)
        gate = GrpcGate(self._authenticator, tracer=self._telemetry.tracer, audit=self._tenancy.audit)
        health_port = None if config.security.tls is None else config.security.tls.health_port
        self._http = HttpListener(http_app, config.host, config.port, config.http_limits, self._tls)
        self._probes: HttpListener | None = None
        try:
            if health_port is not None:
                # Beside the other two servers' shares of this process's files.
                limits = replace(config.http_limits, max_connections=max(1, config.http_limits.max_connections // 8))
                probes = build_health_app(self.health)
                self._probes = HttpListener(probes, config.host, health_port, limits, option="health_port")
            self._grpc = GrpcListener(
                inference, admin, vllm, gate, config.host, config.grpc_port, config.grpc_limits, self._tls
            )
        except InvalidOption:
            for listener in self._http_listeners:
                listener.close()
            raise

    @property
    def _http_listeners(self) -> list[HttpListener]:
        return [self._http] if self._probes is None else [self._http, self._probes]

    @property
    def port(self) -> int:
        return self._http.port

    @property
    def grpc_port(self) -> int:
        return self._grpc.port

    @property
    def health_port(self) -> int | None:
        """Of the plain listener for probes alone, where there is one."""
        return None if self._probes is None else self._probes.port

    @property
    def addresses(self) -> str:
        """One line for who started it; what strangers should know of it, in two more."""
        host, scheme = self._config.host, "http" if self._tls is None else "https"
        lines = [f"HTTP {scheme}://{host}:{self.port}/v1, gRPC {host}:{self.grpc_port}"]
        if self._probes is not None:
            lines[0] += f", probes http://{host}:{self._probes.port}"
        if not is_loopback(host):
            if self._authenticator.is_open:
                lines.append("  notice: --insecure: everybody who reaches this address may use and administer it")
            if self._tls is None:
                lines.append("  notice: keys and prompts travel in plain text; see docs/security.md for TLS")
        return "\n".join(lines)

    async def start(self) -> None:
        """Returns when all servers take connections."""
        for listener in self._http_listeners:
            await listener.start()
        await self._grpc.start()
        await self._watch_once()
        looks: dict[str, Callable[[], Awaitable[None]]] = {
            "the replicas' health": self._watch_once,
            "limits and usage": self._tenancy.poll,
        }
        if self._has_files:
            looks["the files of keys and certificates"] = self._poll_files_apart
        self._watchers.extend(asyncio.create_task(_again_and_again(look, what)) for what, look in looks.items())

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those that run. False where some are left after ``timeout_s``."""
        self._admission.close()
        await self._watch_once()
        if not self._admission.num_requests:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._admission.wait_idle()
        except TimeoutError:
            return False
        return True

    async def stop(self, drain_timeout_s: float = 0.0, reason: RemudaError | None = None) -> None:
        """Drain, end what is left with ``reason`` or an error that says so, and close all servers."""
        if not await self.drain(drain_timeout_s):
            _log.warning("%d requests are cut off: the server stops", self._admission.num_requests)
            cut_off = Draining("the server stops and could not finish this request in time; send it again")
            self.service.end_all(reason or cut_off)
            await self.drain(_LAST_WORDS_S)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(listener.stop() for listener in self._http_listeners), self._grpc.stop())
        await self._tenancy.close()
        self._encoder.close()
        self.service.work.close()
        self._files_thread.shutdown(wait=False)
        await asyncio.to_thread(self._telemetry.close)

    async def _poll_files_apart(self) -> None:
        """Keys, certificates and limits that change hold from the next request, and the next connection."""
        await asyncio.get_running_loop().run_in_executor(self._files_thread, self._poll_files)

    def _poll_files(self) -> None:
        self._authenticator.poll()
        self._tenancy.poll_file()
        if self._tls is not None:
            self._tls.poll()

    async def _watch_once(self) -> None:
        self.health.observe()
        await self._grpc.set_ready(self.health.ready()[0])


async def _again_and_again(look: Callable[[], Awaitable[None]], what: str) -> None:
    """Every second, in a task of its own: a shared store that is slow holds up no revocation."""
    while True:
        await asyncio.sleep(_WATCH_INTERVAL_S)
        try:
            await look()
        except Exception:  # noqa: BLE001  the next look must come, or revoked keys stay good and leases end
            _log.exception("%s cannot be looked at; trying again", what)
