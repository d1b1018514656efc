"""Supervisors and the control process die by kill -9 on a Ray that was there before, and that has no place to spare:
what they held is free again, and who replaces them finds it."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray import serve

from cluster.control.ray_node import RayNode
from cluster.control.ray_runtime import RayRuntime
from cluster.control.ray_settings import NodeSpec, authentication_environment
from tests.cluster.test_replicas import Load, ids, wait_for
from tests.support.served import Served, processes_with

NUM_SLOTS = 2
REPLACED_WITHIN_S = 120.0
FREE_WITHIN_S = 120.0
"""The lease on the board is half a minute."""

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]


class OwnRay:
    """Which this process has joined too."""

    def __init__(self, node: RayNode, runtime: RayRuntime) -> None:
        self.address = node.address
        self._node = node
        self._runtime = runtime

    def num_free(self) -> int:
        """Slots."""
        (host,) = self._runtime.nodes()
        return host.cpu_slots - host.used_cpu_slots

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._node.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def own_ray() -> Iterator[OwnRay]:
    with RayNode.start(NodeSpec(cpu_slots=NUM_SLOTS)) as node, pytest.MonkeyPatch.context() as patch:
        for name, value in authentication_environment(node.token_file).items():
            patch.setenv(name, value)
        with RayRuntime.join(node.address) as runtime:
            yield OwnRay(node, runtime)


def kill_control_process(served: Served) -> None:
    (control,) = [process for process in processes_with(served.mark) if process.cmdline()[0] == "remuda: control"]
    control.kill()


def test_a_killed_supervisors_places_go_to_its_replacement_and_all_are_free_after_the_control_process(
    own_ray: OwnRay, tmp_path: Path
) -> None:
    arguments = ("remuda-tiny", "--replicas", str(NUM_SLOTS), "--address", own_ray.address, "--drain-timeout", "5")
    with Served(arguments, tmp_path / "serve.log") as served:
        wait_for(lambda: ids(served) == {"r0", "r1"}, REPLACED_WITHIN_S)
        assert own_ray.num_free() == 0
        load = Load(served, num_clients=2)
        supervisor, _ = own_ray.processes("ray::ServeReplica")
        supervisor.kill()
        wait_for(lambda: len(ids(served)) == 2 and ids(served) - {"r0", "r1"}, REPLACED_WITHIN_S)
        assert load.stop() > 0
        assert served.process is not None
        kill_control_process(served)
        assert served.process.wait(60) == 1
        wait_for(lambda: own_ray.num_free() == NUM_SLOTS, FREE_WITHIN_S)
        wait_for(lambda: own_ray.processes("ray::ServeReplica") == [], FREE_WITHIN_S)
        assert serve.status().applications == {}


def test_a_single_gang_gives_its_places_back_when_the_control_process_is_killed(
    own_ray: OwnRay, tmp_path: Path
) -> None:
    with Served(
        ("remuda-tiny", "--tp", str(NUM_SLOTS), "--address", own_ray.address), tmp_path / "serve.log"
    ) as served:
        assert own_ray.num_free() == 0
        kill_control_process(served)
        assert served.process is not None and served.process.wait(60) == 1
        wait_for(lambda: own_ray.num_free() == NUM_SLOTS, FREE_WITHIN_S)
