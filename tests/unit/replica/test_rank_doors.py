"""Real processes with a side door each: one is stopped, one killed, one runs. Ray's references, which would need a
cluster, are the addresses themselves here."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from cluster.replica import rank_doors
from cluster.replica.rank_doors import RankDoors
from engine.executor.handshake import new_secret

SILENT_S = 4.0
SECRET = new_secret()
PROCESS = """
import sys, threading
from cluster.replica.side_door import SideDoor
door = SideDoor("tcp:127.0.0.1:0", sys.argv[1], {"stay": lambda _: b""})
print(door.address, flush=True)
threading.Event().wait()
"""


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", PROCESS, SECRET]
    with ExitStack() as stack:
        started = []
        for _ in range(3):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            started.append(process)
        yield started


@pytest.mark.timeout(60)
def test_only_a_process_that_is_stopped_counts_as_silent(
    processes: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has ended is Ray's to tell."""
    ray = SimpleNamespace(wait=lambda references, timeout: (references, []), get=lambda reference: reference)
    monkeypatch.setattr(rank_doors, "ray", ray)
    monkeypatch.setattr(rank_doors, "SILENT_S", SILENT_S)
    monkeypatch.setattr(rank_doors, "ASK_INTERVAL_S", 0.1)
    doors = RankDoors(SECRET)
    for rank, process in enumerate(processes):
        assert process.stdout is not None
        doors.add(rank, process.stdout.readline().strip())
    assert doors.silent({0, 1, 2}, time.monotonic()) == []
    processes[1].send_signal(signal.SIGSTOP)
    processes[2].kill()
    stopped_s = time.monotonic()
    while not (silent := doors.silent({0, 1, 2}, time.monotonic())):
        assert time.monotonic() < stopped_s + 30.0
        time.sleep(0.05)
    assert silent == [1]
    doors.add(1, "tcp:127.0.0.1:9")  # a new process takes the place
    assert doors.silent({1}, time.monotonic()) == []
