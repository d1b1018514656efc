"""A rank's place in shared memory, read by others: while it is stopped, after its death, and from another host."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from engine.executor.channel import RankChannel
from engine.executor.handshake import new_secret
from engine.executor.progress_area import ProgressArea, decode_samples, encode_samples
from engine.executor.relay import HostRelay
from engine.executor.socket_hub import SocketHub
from engine.executor.socket_rank import SocketRankChannel
from engine.progress import NO_LAYER, Axis, Operation, RankProgress, RankSample

WAIT_S = 20.0
CHILD = """
import sys
from engine.executor.progress_area import open_slot
from engine.progress import Operation, RankProgress
progress = RankProgress()
progress.attach(open_slot(int(sys.argv[1]), 1), epoch=4)
progress.begin(7)
progress.at(Operation.ATTENTION, 3)
print("there", flush=True)
sys.stdin.read()
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not so within {WAIT_S} s"
        time.sleep(0.01)


def test_a_process_that_cannot_answer_is_read_all_the_same() -> None:
    area = ProgressArea([0, 1])
    os.set_inheritable(area.fd, True)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(area.fd)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"there\n"
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: area.read()[1].process_state == "T")
        unknown, found = area.read()
        assert unknown.operation == Operation.UNKNOWN and unknown.process_state == ""
        assert (found.epoch, found.step, found.layer, found.operation) == (4, 7, 3, Operation.ATTENTION)
        assert found.describe() == "step 7, attention of layer 3" and 0 < found.place_age_s < WAIT_S
        child.kill()
        child.wait(WAIT_S)
        assert area.read()[1].process_state == "X", "whoever gets its number later is somebody else"
    finally:
        child.kill()
        child.wait()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()
        area.close()
    assert area.read() == []


def test_collectives_are_counted_and_waits_seen() -> None:
    area = ProgressArea([0])
    progress = RankProgress()
    progress.attach(area.slot(0), epoch=0)
    marks = progress.axis(Axis.STAGE)
    for _ in range(3):
        marks.enter(Operation.ALL_TO_ALL)
    marks.wait(Operation.ALL_TO_ALL)
    (sample,) = area.read()
    assert (sample.axes[Axis.STAGE].entered, sample.axes[Axis.STAGE].waits_in) == (3, 3)
    assert sample.waits and sample.place == "all-to-all 3, idle" and sample.layer == NO_LAYER
    marks.resume()
    assert not area.read()[0].waits
    assert decode_samples(encode_samples([sample])) == [sample]
    area.close()


def test_a_relay_reports_for_the_ranks_of_its_host() -> None:
    secret, local = new_secret(), f"unix:@remuda-test-{uuid.uuid4().hex}"
    hub = SocketHub([0, 1], secret, ["tcp:127.0.0.1:0"])
    relay = HostRelay(hub.addresses[0], local, secret, [0, 1], WAIT_S)
    channels: list[RankChannel] = [SocketRankChannel(local, secret, [rank], WAIT_S) for rank in (0, 1)]
    try:
        places = []
        for rank, channel in enumerate(channels):
            places.append(RankProgress())
            places[rank].attach(channel.progress_slot(), epoch=2)
        hub.send(b"a plan")
        places[1].begin(5)
        places[1].at(Operation.LAYER, 9)

        def seen() -> RankSample:
            # The executor receives all the time while a plan is on its way.
            with contextlib.suppress(TimeoutError):
                hub.receive(0.05)
            return hub.progress()[1]

        until(lambda: seen().layer == 9)
        first, second = hub.progress()
        assert (first.epoch, first.operation) == (2, Operation.IDLE)
        assert (second.step, second.operation) == (5, Operation.LAYER)
        until(lambda: seen().process_state != "")  # it has not moved: its process is looked at there
    finally:
        for channel in channels:
            channel.close()
        relay.close()
        hub.close()
