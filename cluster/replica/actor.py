"""The two Ray actors of a gang. Ray starts, finds and supervises them; it never carries a token, and what it does carry
are bytes that we encoded."""

import threading
from typing import Any

import msgspec
import ray

from cluster.replica.config import choose_network
from cluster.replica.leader import Leader, LeaderConfig
from cluster.replica.model_source import ModelSource
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig


class Rank:
    """A process with one shard."""

    def run(self, config: bytes, model: str, revision: str | None) -> None:
        """The whole life of the rank; returns when the leader says so or is gone. The checkpoint is found (or
        downloaded) here, on the rank's own host."""
        directory = ModelSource(model, revision).directory()
        worker = msgspec.structs.replace(WorkerConfig.decode(config), model=str(directory))
        choose_network(worker.bind_address)
        run_worker(worker)


class LeaderProcess:
    """A gang's engine loop and its gRPC server."""

    def __init__(self, config: bytes) -> None:
        self._leader = Leader(LeaderConfig.decode(config))
        self._lock = threading.Lock()

    def open(self) -> bytes:
        """Open the step channel. Returns the encoded GangEndpoints."""
        return self._leader.open().encode()

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
RankActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
LeaderActor: Any = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=3)(LeaderProcess)
