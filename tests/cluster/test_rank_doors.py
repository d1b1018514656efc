"""Real rank actors: one whose process is stopped before it has a formation does not answer, one that runs does."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, secrets, signal, time
import ray
from cluster.control.ray_runtime import RayRuntime
from cluster.replica.actor import RankActor
from cluster.replica.rank_doors import ASK_INTERVAL_S, SILENT_S, RankDoors

with RayRuntime.start_local(2):
    secret = secrets.token_hex(32)
    doors = RankDoors(secret)
    actors = [RankActor.options(num_cpus=0).remote("tcp:127.0.0.1:0", secret) for _ in range(2)]
    pids = ray.get([actor.stand_by.remote() for actor in actors])
    for rank, actor in enumerate(actors):
        doors.add(rank, actor.door.remote())
    assert doors.silent({0, 1}, time.monotonic()) == []
    os.kill(pids[1], signal.SIGSTOP)
    stopped_s = time.monotonic()
    while not (silent := doors.silent({0, 1}, time.monotonic())):
        assert time.monotonic() < stopped_s + SILENT_S + 2 * ASK_INTERVAL_S + 10
        time.sleep(0.5)
    assert silent == [1] and time.monotonic() > stopped_s + SILENT_S - 1
    ray.kill(actors[1])
    doors.add(1, RankActor.options(num_cpus=0).remote("tcp:127.0.0.1:0", secret).door.remote())
    assert doors.silent({0, 1}, time.monotonic()) == []
    print("held")
"""


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_rank_that_is_stopped_does_not_answer() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0 and "held" in done.stdout, done.stdout + done.stderr
