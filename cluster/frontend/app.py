"""The front end as a whole: built from one configuration, started and stopped as one."""

import asyncio
import importlib.metadata
import logging
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import is_loopback
from cluster.errors import Draining
from cluster.frontend.adapters import Adapters
from cluster.frontend.admission import Admission
from cluster.frontend.answers import HttpSettings
from cluster.frontend.auth import ApiKeys, read_api_keys
from cluster.frontend.backend import Backend
from cluster.frontend.calls import TimeLimits
from cluster.frontend.clock import LoopClock
from cluster.frontend.encoding import PromptEncoder
from cluster.frontend.grpc_admin import AdminServicer
from cluster.frontend.grpc_service import InferenceServicer
from cluster.frontend.health import Health
from cluster.frontend.http import build_http_app
from cluster.frontend.http_protocol import HttpLimits
from cluster.frontend.listeners import GrpcListener, HttpListener
from cluster.frontend.metrics import Metrics
from cluster.frontend.model_files import read_model_files
from cluster.frontend.service import Service
from cluster.frontend.tokenizer import Tokenizer
from engine.config import LoraConfig
from engine.errors import InvalidOption, RemudaError

_log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_LAST_WORDS_S = 1.0
"""For telling those who are cut off that they are."""

_LIMITS = TimeLimits(total_s=600.0, queue_s=60.0, first_token_s=120.0)


@dataclass(frozen=True)
class FrontEndConfig:
    """``model_path`` has the checkpoint's tokenizer and small JSON files. Port 0 takes a free one. ``stall_s``: work
    without a finished step for so long is a stall. ``max_live_sequences`` bounds choices, not requests. ``lora_dir``:
    clients may have adapters below it loaded; None: none at all.
    """

    name: str
    model_path: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    api_key_file: Path | None = None
    limits: TimeLimits = _LIMITS
    max_live_sequences: int = 1024
    stall_s: float = 60.0
    lora_dir: Path | None = None
    max_lora_rank: int = LoraConfig.max_rank
    http: HttpSettings = field(default_factory=HttpSettings)
    http_limits: HttpLimits = field(default_factory=HttpLimits)


class FrontEnd:
    """Everything is checked and both ports are taken here, before the model is ready to answer.

    Args:
        config: what to serve, where and within which bounds.
        backend: the replicas. Whoever made it closes it, after ``stop``.

    Raises:
        InvalidOption: a port that is taken, a key file without keys, an open address without keys.
        CheckpointError: the checkpoint's tokenizer cannot be used.
    """

    def __init__(self, config: FrontEndConfig, backend: Backend) -> None:
        keys = _keys_of(config)
        files = read_model_files(config.model_path)
        clock = LoopClock()
        self._encoder = PromptEncoder(Tokenizer(files), files.vocab_size)
        self._admission = Admission(config.max_live_sequences)
        metrics = Metrics(config.name, backend.replicas)
        metrics.watch_live(lambda: self._admission.num_requests)
        adapters = Adapters(config.name, backend, config.lora_dir, config.max_lora_rank)
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
        )
        self.health = Health(backend.replicas, lambda: self._admission.is_closed, clock, config.stall_s)
        http_app = build_http_app(self.service, self.health, metrics, keys, config.http)
        version = importlib.metadata.version("remuda")
        self._http = HttpListener(http_app, config.host, config.port, config.http_limits)
        inference, admin = InferenceServicer(self.service, keys), AdminServicer(self.service, keys, version)
        try:
            self._grpc = GrpcListener(inference, admin, config.host, config.grpc_port)
        except InvalidOption:
            self._http.close()
            raise
        self._watcher: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return self._http.port

    @property
    def grpc_port(self) -> int:
        return self._grpc.port

    async def start(self) -> None:
        """Returns when both servers take connections."""
        await self._http.start()
        await self._grpc.start()
        await self._watch_once()
        self._watcher = asyncio.create_task(self._watch())

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those that run. False where some are left after ``timeout_s``."""
        self._admission.close()
        await self._watch_once()
        if not self._admission.num_requests:
            return True
        try:
            await asyncio.wait_for(self._admission.wait_idle(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self, drain_timeout_s: float = 0.0, reason: RemudaError | None = None) -> None:
        """Drain, end what is left with ``reason`` or an error that says so, and close both servers."""
        if not await self.drain(drain_timeout_s):
            _log.warning("%d requests are cut off: the server stops", self._admission.num_requests)
            cut_off = Draining("the server stops and could not finish this request in time; send it again")
            self.service.end_all(reason or cut_off)
            await self.drain(_LAST_WORDS_S)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.gather(self._http.stop(), self._grpc.stop())
        self._encoder.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            await self._watch_once()

    async def _watch_once(self) -> None:
        self.health.observe()
        await self._grpc.set_ready(self.health.ready()[0])


def _keys_of(config: FrontEndConfig) -> ApiKeys:
    if config.api_key_file is not None:
        return read_api_keys(config.api_key_file)
    if not is_loopback(config.host):
        raise InvalidOption(
            f"--host {config.host} is open to others; give --api-key-file FILE with one key per line, "
            "or listen at 127.0.0.1"
        )
    return ApiKeys()
