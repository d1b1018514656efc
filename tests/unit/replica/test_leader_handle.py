"""A real process with a side door, in the place of a leader: when it counts as one that hangs. Ray's references, which
would need a cluster, are the address itself and the answers."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from cluster.replica import leader_handle
from cluster.replica.leader_handle import LeaderHandle
from cluster.replica.silence import SILENT_S, Silence
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import new_secret

SECRET = new_secret()
PROCESS = """
import sys, threading
from cluster.replica.side_door import SideDoor
door = SideDoor("tcp:127.0.0.1:0", sys.argv[1], {"start": lambda _: b"", "load": lambda _: b"idle"})
print(door.address, flush=True)
threading.Event().wait()
"""


def looked_at(silence: Silence, began_s: float, end_s: float, interval_s: float = 0.5) -> float:
    """What it says at the end."""
    silent_s, now_s = 0.0, began_s
    while now_s < end_s:
        now_s += interval_s
        silent_s = silence.look(now_s)
    return silent_s


def test_silence_is_as_long_as_somebody_looked() -> None:
    assert looked_at(Silence(100.0), 100.0, 115.0) == pytest.approx(15.0)
    assert looked_at(Silence(100.0), 100.0, 116.0, interval_s=2.0) == pytest.approx(16.0)


def test_a_machine_that_was_suspended_blames_nobody() -> None:
    silence = Silence(100.0)
    assert looked_at(silence, 100.0, 104.0) == pytest.approx(4.0)
    assert silence.look(3700.0) < SILENT_S / 2


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROCESS, SECRET]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


@pytest.mark.timeout(60)
def test_a_leader_that_is_stopped_is_silent_and_is_not_waited_for(
    process: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    monkeypatch.setattr(leader_handle, "ray", SimpleNamespace(get=lambda reference, timeout: reference))
    actor = SimpleNamespace(
        door=SimpleNamespace(remote=lambda: address), poll=SimpleNamespace(remote=lambda wait_s: b"one\ntwo\n")
    )
    leader = LeaderHandle(actor, SECRET)
    later_s = time.monotonic()
    for _ in range(30):
        later_s += 2.0
        assert not leader.is_silent(later_s), "a process that Ray has just been asked for may take its time"
    leader.begin()
    assert leader.call("load") == b"idle"
    assert leader.take_news() == [b"one", b"two"]
    asked_s = time.monotonic()
    assert not any(leader.is_silent(asked_s + second) for second in range(int(SILENT_S) - 1))
    assert leader.is_silent(asked_s + SILENT_S + 1.0)
    leader.take_news()
    assert not leader.is_silent(time.monotonic() + 2.0), "it has answered"

    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(leader_handle, "SILENT_S", 1.0)
    with pytest.raises(ChannelClosed, match="did not answer load"):
        leader.call("load")
