"""A gang whose ranks are child processes of the leader, on one host, without Ray."""

import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.errors import RankFailure
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.flight_record import FlightRecord
from engine.executor.gang_start import GangReady, OnMessage
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.worker_config import WorkerConfig
from engine.messages import LayerExperts
from engine.model_config import ModelConfig

END_TIMEOUT_S = 8.0
"""A rank that has not left by then is killed."""
_LOOPBACK = "127.0.0.1"
STORE_TIMEOUT_S = 120.0

RankProcess = subprocess.Popen[bytes]


class ProcessGang(ChannelExecutor):
    """One formation. Starts at construction; ``ready`` says what came of it. See ChannelExecutor and GangStart for what
    is raised.

    Args:
        config: of any rank; rank, channel, secret and store are filled in here.
        max_model_len: None for the longest that fits.
        step_timeout_s: a step that takes longer has failed.
        processes: the living ranks of the formation before, by rank; ``close`` ends them too.
        experts: see InitCache.
        record: see ChannelExecutor.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        max_model_len: int | None = None,
        on_message: OnMessage = lambda message: None,
        step_timeout_s: float = 120.0,
        processes: Mapping[int, RankProcess] | None = None,
        experts: Sequence[LayerExperts] = (),
        record: FlightRecord | None = None,
    ) -> None:
        num_ranks = config.parallel.num_ranks
        secret = new_secret()
        hub = SocketHub(range(num_ranks), secret, [f"unix:@remuda-{uuid.uuid4().hex}"])
        super().__init__(hub, config.parallel, epoch=config.epoch, step_timeout_s=step_timeout_s, record=record)
        self.config = config
        self._store = _serve_store() if num_ranks > 1 else None
        living = dict(processes or {})
        self.processes: list[RankProcess] = []
        try:
            for rank in range(num_ranks):
                self.processes.append(living.pop(rank) if rank in living else _spawn())
                _hand(self.processes[-1], self._config_of(rank, hub.addresses[0], secret))
            self.ready: GangReady = self.start(
                ModelConfig.from_directory(config.model, config.quantization),
                block_size=config.block_size,
                max_model_len=max_model_len,
                on_message=on_message,
                experts=experts,
            )
        except BaseException:
            self.processes += living.values()
            self.close()
            raise

    def _config_of(self, rank: int, address: str, secret: str) -> WorkerConfig:
        config = self.config
        return msgspec.structs.replace(
            config,
            rank=rank,
            device=f"cuda:{rank}" if config.device == "cuda" else config.device,
            channel_address=address,
            secret=secret,
            relay=None,
            store_host=_LOOPBACK,
            store_port=0 if self._store is None else self._store.port,
            bind_address=_LOOPBACK,
        )

    def _check_processes(self) -> None:
        for rank, process in enumerate(self.processes):
            if (status := process.poll()) is not None:
                raise RankFailure(f"rank {rank} ended with status {status} before it was ready", rank)

    def reform(
        self, experts: Sequence[LayerExperts] = (), on_message: OnMessage = lambda message: None
    ) -> "ProcessGang":
        """The next formation, of the ranks that live and of new ones in place of those that do not, or that the failure
        names. ``experts``: see InitCache. ``on_message``: see GangStart."""
        failure = self.failure
        self.disband()
        self._store = None
        if isinstance(failure, RankFailure) and failure.rank is not None:
            self.processes[failure.rank].kill()
            self.processes[failure.rank].wait()
        living = {rank: process for rank, process in enumerate(self.processes) if process.poll() is None}
        for process in self.processes:
            if process.poll() is not None:
                _close_input(process)
        ready = self.ready
        config = msgspec.structs.replace(self.config, epoch=self.config.epoch + 1, num_blocks=ready.cache.num_blocks)
        return ProcessGang(
            config,
            max_model_len=ready.max_model_len,
            on_message=on_message,
            step_timeout_s=self._step_timeout_s,
            processes=living,
            experts=experts,
        )

    def close(self) -> None:
        super().close()
        for process in self.processes:
            _close_input(process)
        deadline = time.monotonic() + END_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._store = None  # its destructor is the only way to stop it


def _spawn() -> RankProcess:
    return subprocess.Popen(
        [sys.executable, "-m", "engine.executor.worker_process"], stdin=subprocess.PIPE, start_new_session=True
    )


def _hand(process: RankProcess, config: WorkerConfig) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended; the channel will miss it
        process.stdin.write(config.encode() + b"\n")
        process.stdin.flush()


def _close_input(process: RankProcess) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _serve_store() -> Any:
    """The gang's rendezvous store. Whoever drives ranks in other processes needs torch for nothing else."""
    from engine.parallel.store import serve_store

    return serve_store(_LOOPBACK, STORE_TIMEOUT_S)
