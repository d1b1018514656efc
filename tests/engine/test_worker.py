"""A rank as a process of its own, behind a relay too; it never outlives its leader."""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine.errors import RankFailure
from engine.executor.handshake import new_secret
from engine.executor.socket_hub import SocketHub
from engine.executor.worker_config import RelayConfig, WorkerConfig
from engine.messages import (
    FromRank,
    Hello,
    InitCache,
    Loaded,
    LoadProgress,
    Ready,
    Shutdown,
    decode_from_rank,
    encode,
)
from tests.parity.architectures import make_reference

WAIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference("llama2", tmp_path_factory.mktemp("llama2")).directory


class Leader:
    """A hub for one rank, and the process that is it."""

    def __init__(self) -> None:
        self.secret = new_secret()
        self.hub = SocketHub([0], self.secret, [f"unix:@remuda-test-{uuid.uuid4().hex}", "tcp:127.0.0.1:0"])
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, directory: Path, **changes: Any) -> "subprocess.Popen[bytes]":
        values = {
            "rank": 0,
            "channel_address": self.hub.addresses[0],
            "secret": self.secret,
            "model": str(directory),
            "kv_cache_memory_bytes": 2**20,
        }
        command = [sys.executable, "-m", "engine.executor.worker_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(WorkerConfig(**values | changes).encode())
        self.process.stdin.close()
        return self.process

    def next(self) -> FromRank:
        rank, data = self.hub.receive(WAIT_S)
        assert rank == 0
        return decode_from_rank(data)

    def until(self, kind: type[FromRank]) -> list[FromRank]:
        found = [self.next()]
        while not isinstance(found[-1], kind):
            found.append(self.next())
        return found

    def close(self) -> None:
        self.hub.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()


@pytest.fixture
def leader() -> Iterator[Leader]:
    opened = Leader()
    yield opened
    opened.close()


def test_the_life_of_a_rank_behind_a_relay(leader: Leader, checkpoint: Path) -> None:
    local = f"unix:@remuda-test-{uuid.uuid4().hex}"
    process = leader.spawn(checkpoint, channel_address=local, relay=RelayConfig(leader.hub.addresses[1], (0,)))
    hello, *progress, loaded = leader.until(Loaded)
    assert isinstance(hello, Hello) and isinstance(loaded, Loaded)
    assert (hello.pid, hello.device) == (process.pid, "cpu")
    phases = dict.fromkeys(message.phase for message in progress if isinstance(message, LoadProgress))
    assert list(phases) == ["import", "rendezvous", "load", "profile"]
    assert loaded.kv_bytes_available == 2**20 and set(loaded.phase_seconds) == set(phases)
    leader.hub.send(encode(InitCache(0, loaded.kv_bytes_available // loaded.block_bytes, 100)))
    assert isinstance(leader.until(Ready)[-1], Ready)
    leader.hub.send(encode(Shutdown("that is all")))
    assert process.wait(WAIT_S) == 0
    with pytest.raises(RankFailure):
        leader.hub.receive(WAIT_S)


def test_a_rank_that_hangs_does_not_outlive_its_leader(leader: Leader, checkpoint: Path) -> None:
    """It waits for a second rank, in a call of gloo that nothing interrupts."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    process = leader.spawn(checkpoint, tp=2, store_port=store.port, collective_timeout_s=300.0)
    messages = [leader.next() for _ in range(3)]
    assert [message.phase for message in messages if isinstance(message, LoadProgress)] == ["import", "rendezvous"]
    assert process.poll() is None
    began = time.monotonic()
    leader.hub.close()
    assert process.wait(20.0) == 1
    assert time.monotonic() - began < 10.0


def test_a_rank_that_is_not_let_in_says_so_and_exits(leader: Leader, checkpoint: Path) -> None:
    process = leader.spawn(checkpoint, secret=new_secret())
    assert process.wait(WAIT_S) == 1
    assert process.stderr is not None
    stderr = process.stderr.read()
    assert b"did not let rank 0 in" in stderr and b"Traceback" not in stderr
