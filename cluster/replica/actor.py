"""The two Ray actors of a gang. Ray starts, finds and supervises them; it never carries a token, and what it does carry
are bytes that we encoded."""

import importlib
import os
import threading
import time
from typing import Any

import msgspec
import ray

from cluster.replica.config import choose_network, quiet_torch
from cluster.replica.leader import Leader, LeaderConfig
from cluster.replica.model_source import ModelSource
from engine.executor.formations import Formations
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig

RANK_LEASE_S = 60.0
"""A rank that nobody gives a formation, or keeps standing by, for so long is an orphan, and ends."""


class Rank:
    """A process with one shard, or one that stands by to become one."""

    def __init__(self) -> None:
        quiet_torch()
        self._formations = Formations(RANK_LEASE_S)
        self._begun = threading.Event()
        self._last_call_s: float | None = None

    def stand_by(self) -> int:
        """Import what a rank needs, which is most of the time between a rank's creation and its work. Returns the
        process's number. Every call renews the lease of a rank that stands by."""
        is_first, self._last_call_s = self._last_call_s is None, time.monotonic()
        if is_first:
            importlib.import_module("engine.executor.rank_startup")
            threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()
        return os.getpid()

    def run(self, config: bytes, model: str, revision: str | None) -> None:
        """The whole life of the rank, from its first formation on: an encoded WorkerConfig. Returns when a leader says
        so, or when it is left without a formation. The checkpoint is found (or downloaded) here, on its own host."""
        self._begun.set()
        self.form(config, model, revision)
        run_worker(self._formations)

    def form(self, config: bytes, model: str, revision: str | None) -> None:
        """The gang's next formation. Raises ProtocolViolation where it is not later than the last."""
        directory = ModelSource(model, revision).directory()
        worker = msgspec.structs.replace(WorkerConfig.decode(config), model=str(directory))
        choose_network(worker.bind_address)
        self._formations.put(worker)

    def _watch_lease(self) -> None:
        while not self._begun.wait(1.0):
            if self._last_call_s is not None and time.monotonic() - self._last_call_s > RANK_LEASE_S:
                os._exit(1)


class LeaderProcess:
    """A gang's engine loop and its gRPC server."""

    def __init__(self, config: bytes) -> None:
        self._leader = Leader(LeaderConfig.decode(config))
        self._lock = threading.Lock()

    def open(self, epoch: int, rank_hosts: list[str]) -> bytes:
        """Open the step channel of a formation. Returns the encoded GangEndpoints."""
        return self._leader.open(epoch, rank_hosts).encode()

    def start(self) -> None:
        """Begin to wait for the ranks, then to serve; what happens is reported by ``poll``."""
        self._leader.start()

    def poll(self, wait_s: float) -> bytes:
        """Encoded events since the last call, as soon as there is one. Calling it renews the supervisor's lease."""
        with self._lock:
            return self._leader.poll(wait_s)

    def load(self) -> bytes:
        """The encoded LeaderLoad; empty before the gang serves."""
        load = self._leader.load()
        return b"" if load is None else load.encode()

    def drain(self) -> None:
        """Refuse new requests from now on; what runs may finish."""
        self._leader.drain()

    def stop(self) -> None:
        """End the ranks and the server; returns when both have ended."""
        self._leader.stop()


# Nobody restarts a rank or a leader but their supervisor. The leader is asked for events while it starts or stops.
RankActor: Any = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2)(Rank)
LeaderActor: Any = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4)(LeaderProcess)
