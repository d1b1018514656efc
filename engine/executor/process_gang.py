"""A gang whose ranks are child processes of the leader, on one host, without Ray."""

import subprocess
import sys
import time
import uuid
from typing import Any

import msgspec

from engine.executor.channel_executor import ChannelExecutor
from engine.executor.gang_start import GangReady, OnMessage
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig

_END_TIMEOUT_S = 8.0
"""A rank that has not left by then is killed."""
_LOOPBACK = "127.0.0.1"
STORE_TIMEOUT_S = 120.0


class ProcessGang(ChannelExecutor):
    """Starts at construction; ``ready`` says what came of it. See ChannelExecutor and GangStart for what is raised.

    Args:
        config: of any rank; rank, channel, secret and store are filled in here.
        max_model_len: None for the longest that fits.
        step_timeout_s: a step that takes longer has failed.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        max_model_len: int | None = None,
        on_message: OnMessage = lambda message: None,
        step_timeout_s: float = 120.0,
    ) -> None:
        num_ranks = config.parallel.num_ranks
        secret = new_secret()
        hub = SocketHub(range(num_ranks), secret, [f"unix:@remuda-{uuid.uuid4().hex}"])
        super().__init__(hub, config.parallel, epoch=config.epoch, step_timeout_s=step_timeout_s)
        self._store = _serve_store() if num_ranks > 1 else None
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_ranks):
                self.processes.append(
                    _spawn(
                        msgspec.structs.replace(
                            config,
                            rank=rank,
                            device=f"cuda:{rank}" if config.device == "cuda" else config.device,
                            channel_address=hub.addresses[0],
                            secret=secret,
                            relay=None,
                            store_host=_LOOPBACK,
                            store_port=0 if self._store is None else self._store.port,
                            bind_address=_LOOPBACK,
                        )
                    )
                )
            self.ready: GangReady = self.start(
                ModelConfig.from_directory(config.model, config.quantization),
                block_size=config.block_size,
                max_model_len=max_model_len,
                on_message=on_message,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._store = None  # its destructor is the only way to stop it


def _spawn(config: WorkerConfig) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.executor.worker_process"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(config.encode())
    process.stdin.close()
    return process


def _serve_store() -> Any:
    """The gang's rendezvous store. Whoever drives ranks in other processes needs torch for nothing else."""
    from engine.parallel.store import serve_store

    return serve_store(_LOOPBACK, STORE_TIMEOUT_S)
