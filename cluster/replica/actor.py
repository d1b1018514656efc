"""The two Ray actors of a gang. Ray starts, finds and supervises them; it never carries a token, and what it does carry
are bytes that we encoded.

Each has one thread of Ray's, which spends its life in one call (a rank) or in calls that wait (a leader): an actor that
takes several calls at a time is woken a hundred times a second. All else comes through the side door.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import ray

from cluster.replica.build import CHECKPOINT, software, with_checkpoint
from cluster.replica.config import choose_network, quiet_torch
from cluster.replica.cores import bind_to_cores
from cluster.replica.leader import Leader, LeaderConfig
from cluster.replica.model_source import ModelSource
from cluster.replica.side_door import SideDoor
from engine.errors import ProtocolViolation
from engine.executor.formations import Formations
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig

RANK_LEASE_S = 60.0
"""A rank that nobody gives a formation, or keeps standing by, for so long is an orphan, and ends."""


class OpenCall(msgspec.Struct, frozen=True, array_like=True):
    """The step channel of a formation is to be opened, for ranks on these hosts."""

    epoch: int
    rank_hosts: list[str]


class RankCall(msgspec.Struct, frozen=True, array_like=True):
    """A formation, as a rank is told of it. ``config``: an encoded WorkerConfig."""

    config: bytes
    model: str
    revision: str | None


class Rank:
    """A process with one shard, or one that stands by to become one.

    Args:
        door: the side door's address; it takes ``form`` (an encoded RankCall): the gang's next formation, and ``stay``:
            one will come, later.
        secret: of the side door.
    """

    def __init__(self, door: str, secret: str) -> None:
        quiet_torch()
        self._runs = software()
        self._formations = Formations(RANK_LEASE_S)
        self._door = SideDoor(door, secret, {"form": self._form, "stay": lambda _: _nothing(self._formations.renew)})
        self._begun = threading.Event()
        self._last_call_s: float | None = None
        self._directory = ""
        """The checkpoint's, once it was found."""

    def stand_by(self) -> int:
        """Import what a rank needs, which is most of the time between a rank's creation and its work. Returns the
        process's number. Every call renews the lease of a rank that stands by."""
        is_first, self._last_call_s = self._last_call_s is None, time.monotonic()
        if is_first:
            importlib.import_module("engine.executor.rank_startup")
            threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()
        return os.getpid()

    def door(self) -> str:
        """The side door's address."""
        return self._door.address

    def run(self, call: bytes) -> None:
        """The whole life of the rank, from its first formation on: an encoded RankCall. Returns when a leader says so,
        or when it is left without a formation. The checkpoint is found (or downloaded) here, on its own host."""
        self._begun.set()
        with contextlib.suppress(ProtocolViolation):  # the next formation may have come by the door already
            self._form(call)
        run_worker(self._formations)

    def _form(self, encoded: bytes) -> bytes:
        """Raises ProtocolViolation where the formation is not later than the last."""
        call = msgspec.msgpack.decode(encoded, type=RankCall)
        config = WorkerConfig.decode(call.config)
        if CHECKPOINT not in self._runs:
            # Once: weights and memory stay, and a disk that hangs must not keep a survivor from joining in time.
            directory = ModelSource(call.model, call.revision).directory()
            self._directory, self._runs = str(directory), with_checkpoint(self._runs, directory)
            bind_to_cores(config)
        worker = msgspec.structs.replace(config, model=self._directory, runs=self._runs)
        choose_network(worker.bind_address)
        self._formations.put(worker)
        return b""

    def _watch_lease(self) -> None:
        while not self._begun.wait(1.0):
            if self._last_call_s is not None and time.monotonic() - self._last_call_s > RANK_LEASE_S:
                os._exit(1)


class LeaderProcess:
    """A gang's engine loop and its gRPC server.

    Args:
        config: an encoded LeaderConfig.
        door: the side door's address. It takes ``open`` (an encoded OpenCall) and answers with the encoded
            GangEndpoints, ``start``, ``stay``, ``load`` (an encoded LeaderLoad; empty before the gang serves),
            ``drain`` and ``stop``; see Leader.
        secret: of the side door.
    """

    def __init__(self, config: bytes, door: str, secret: str) -> None:
        leader = self._leader = Leader(LeaderConfig.decode(config))
        calls = {
            "open": self._open,
            "start": lambda _: _nothing(leader.start),
            "stay": lambda _: _nothing(leader.stay),
            "load": self._load,
            "drain": lambda _: _nothing(leader.drain),
            "stop": lambda _: _nothing(leader.stop),
        }
        self._door = SideDoor(door, secret, calls)

    def door(self) -> str:
        """The side door's address."""
        return self._door.address

    def poll(self, wait_s: float) -> bytes:
        """Encoded events since the last call, as soon as there is one. Calling it renews the supervisor's lease."""
        return self._leader.poll(wait_s)

    def _open(self, encoded: bytes) -> bytes:
        call = msgspec.msgpack.decode(encoded, type=OpenCall)
        return self._leader.open(call.epoch, call.rank_hosts).encode()

    def _load(self, _: bytes) -> bytes:
        load = self._leader.load()
        return b"" if load is None else load.encode()


def _nothing(call: Callable[[], None]) -> bytes:
    call()
    return b""


# Nobody restarts a rank or a leader but their supervisor.
RankActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
LeaderActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(LeaderProcess)
