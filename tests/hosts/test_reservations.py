"""Ranks' places in a real Ray whose hosts are lost and come back: a rank finds every place that there is."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.control.ray_settings import authentication_environment
from tests.chaos.hosts import kill_raylet_of
from tests.chaos.several_hosts import RayHosts
from tests.support.hosts.bed import Bed

pytestmark = [pytest.mark.netns, pytest.mark.full]

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # where Ray also writes
import ray
from cluster.control.ray_runtime import RayRuntime
from cluster.replica.control_service import ControlService
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.reservations import Reservations

def until(condition):
    deadline_s = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return condition()

with RayRuntime.join(sys.argv[1]):
    control = ControlService(ray.get_runtime_context().gcs_address)
    ranks = [PlacedRank(rank, host) for rank, host in enumerate(sys.argv[2:])]
    reserved = Reservations("r0", ranks, "CPU", control, 20.0)
    calls = {
        "is lost": lambda: until(lambda: [rank for rank, _ in reserved.lost()] == [1]),
        "has room": lambda: until(lambda: reserved.has_room(1)),
        "has no room": lambda: until(lambda: not reserved.has_room(1)),
        "find": lambda: (reserved.find(1), reserved.places[1].host)[1],
        "release": lambda: (reserved.release(), until(lambda: ray.available_resources().get("CPU") == 2.0))[1],
    }
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(calls[line.strip()]()), file=answers, flush=True)
"""


@pytest.mark.timeout(200)
def test_a_rank_finds_every_place_that_there_is(tmp_path: Path) -> None:
    """Two hosts with one place each, beside the head with rank 0."""
    with ExitStack() as stack:
        bed = stack.enter_context(Bed(3))
        hosts = RayHosts(bed, bed.start_ray(cpu_slots=(1, 1, 1)), tmp_path, (1, 1, 1))
        head, one, other = bed.hosts
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **authentication_environment(hosts.nodes[0].token_file)}
        log = stack.enter_context((tmp_path / "driver.log").open("w"))
        driver = head.popen(
            [sys.executable, "-c", DRIVER, hosts.nodes[0].address, head.address, one.address],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.fileno(),
        )
        assert driver.stdin is not None and driver.stdout is not None
        stdin, stdout = driver.stdin, driver.stdout

        def ask(question: str) -> object:
            stdin.write(question + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        assert json.loads(stdout.readline()) == "ready"
        here, there = one, other
        for _ in range(3):  # away, back to where Ray holds what was left, and away again
            kill_raylet_of(here)
            assert ask("is lost") and ask("has room")
            assert ask("find") == there.address
            hosts.join_again(here)
            here, there = there, here
        kill_raylet_of(there)
        kill_raylet_of(here)
        assert ask("is lost") and ask("has no room")
        hosts.join_again(one)
        assert ask("has room")
        assert ask("find") == one.address
        assert ask("release")
        stdin.close()
        assert driver.wait(30) == 0
