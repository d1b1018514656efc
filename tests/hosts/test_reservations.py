"""Ranks' places in a real Ray whose hosts are lost and come back: a rank finds every place that there is, and a group
stays whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.control.ray_settings import authentication_environment
from tests.chaos.hosts import kill_raylet_of
from tests.chaos.several_hosts import RayHosts
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.full]

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # where Ray also writes
import ray
from cluster.control.next_hosts import next_hosts
from cluster.control.ray_runtime import RayRuntime
from cluster.replica.control_service import ControlService
from cluster.replica.events import LaunchConfig
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.reservations import Reservations
from tests.support.hosted_gang import small_plan

def until(condition):
    deadline_s = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return condition()

with RayRuntime.join(sys.argv[1]):
    control = ControlService(ray.get_runtime_context().gcs_address)
    ranks = [PlacedRank(rank, host) for rank, host in enumerate(sys.argv[4:])]
    plan = small_plan("m", tensor_parallel_size=int(sys.argv[2]), pipeline_parallel_size=int(sys.argv[3]))
    config = LaunchConfig(plan, 1, None, 1, "")
    reserved = Reservations("r0", ranks, "CPU", control, next_hosts(config, ranks[0].host), 20.0)
    last = len(ranks) - 1
    calls = {
        "is lost": lambda: until(lambda: last in [rank for rank, _ in reserved.lost()]),
        "has room": lambda: until(lambda: reserved.find_room(last)),
        "has no room": lambda: until(lambda: not reserved.find_room(last) and "have no host" in reserved.why_not)
        and reserved.why_not,
        "move": lambda: ([reserved.move(rank) for rank in range(len(ranks))], [p.host for p in reserved.places])[1],
        "release": lambda: (reserved.release(), until(lambda: ray.available_resources().get("CPU") == 2.0))[1],
    }
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(calls[line.strip()]()), file=answers, flush=True)
"""


class Places:
    """A process in the first host that holds ``tp`` × ``pp`` ranks' places on the hosts of ``ranks``."""

    def __init__(self, hosts: RayHosts, tp: int, pp: int, ranks: list[Host]) -> None:
        head = hosts.nodes[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **authentication_environment(head.token_file)}
        arguments = [head.address, str(tp), str(pp), *(host.address for host in ranks)]
        with (hosts.directory / "driver.log").open("w") as log:
            self._driver = hosts.bed.hosts[0].popen(
                [sys.executable, "-c", DRIVER, *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.fileno(),
            )
        assert self._driver.stdin is not None and self._driver.stdout is not None
        self._stdin, self._stdout = self._driver.stdin, self._driver.stdout
        assert json.loads(self._stdout.readline()) == "ready"

    def ask(self, question: str) -> object:
        self._stdin.write(question + "\n")
        self._stdin.flush()
        return json.loads(self._stdout.readline())

    def release(self) -> None:
        assert self.ask("release")
        self._stdin.close()
        assert self._driver.wait(30) == 0


@pytest.mark.timeout(200)
def test_a_rank_finds_every_place_that_there_is(tmp_path: Path, make_bed: MakeBed) -> None:
    """Two hosts with one place each, beside the head with the first stage."""
    bed = make_bed(3)
    hosts = RayHosts(bed, bed.start_ray(cpu_slots=(1, 1, 1)), tmp_path, (1, 1, 1))
    head, one, other = bed.hosts
    places = Places(hosts, 1, 2, [head, one])
    here, there = one, other
    for _ in range(3):  # away, back to where Ray holds what was left, and away again
        kill_raylet_of(here)
        assert places.ask("is lost") and places.ask("has room")
        assert places.ask("move") == [head.address, there.address]
        hosts.join_again(here)
        here, there = there, here
    kill_raylet_of(there)
    kill_raylet_of(here)
    assert places.ask("is lost") and "only 0 slots are free" in str(places.ask("has no room"))
    hosts.join_again(one)
    assert places.ask("has room")
    assert places.ask("move") == [head.address, one.address]
    places.release()


@pytest.mark.timeout(200)
def test_a_lost_group_waits_for_a_host_that_has_room_for_all_of_it(tmp_path: Path, make_bed: MakeBed) -> None:
    """A host with a group of two is lost; the two others have a place each."""
    slots = (0, 2, 1, 1)
    bed = make_bed(4)
    hosts = RayHosts(bed, bed.start_ray(cpu_slots=slots), tmp_path, slots)
    _, whole, one, other = bed.hosts
    places = Places(hosts, 2, 1, [whole, whole])
    kill_raylet_of(whole)
    assert places.ask("is lost") and "no host has room for a whole group of 2" in str(places.ask("has no room"))
    kill_raylet_of(one)
    hosts.nodes[2].close()
    hosts.nodes[2] = bed.join_ray(hosts.nodes[0], one, 2)
    assert places.ask("has room")
    assert places.ask("move") == [one.address] * 2
    kill_raylet_of(other)
    places.release()
