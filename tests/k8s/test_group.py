"""A group of hosts as LeaderWorkerSet starts one: the same commands, with the variables that it sets, in namespaces."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts.bed import Bed
from tests.support.hosts.fixture import MakeBed
from tests.support.hosts.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.full]

REMUDA = str(Path(sys.executable).parent / "remuda")
QUESTION = "My name is Zora. What is my name?"
READY_TIMEOUT_S = 120.0


class Pods:
    """The hosts as pods of one group; the first is the leader's."""

    def __init__(self, bed: Bed, directory: Path) -> None:
        self.bed = bed
        self.directory = directory
        self.secret = directory / "secret"
        self.secret.write_text("one secret for the group\n")
        self.running: dict[int, subprocess.Popen[str]] = {}

    def start(self, index: int) -> None:
        """The pod's container."""
        pod, head = self.bed.hosts[index], self.bed.hosts[0]
        common = ["--device", "cpu", "--devices", "2", "--secret-file", str(self.secret), "--health-port", "8080"]
        if index == 0:
            command = ["engine", "remuda-tiny", "--pp", "2", "--tp", "2", "--hosts", str(len(self.bed.hosts)), *common]
        else:
            command = ["worker", "--head", f"{head.address}:6379", *common]
        variables = {
            "POD_IP": pod.address,
            "LWS_LEADER_ADDRESS": head.address,
            "LWS_GROUP_SIZE": str(len(self.bed.hosts)),
            "LWS_WORKER_INDEX": str(index),
        }
        self.running[index] = self._popen(pod, f"pod-{index}", command, variables)

    def start_front_end(self, index: int) -> None:
        """Beside a pod: what it needs is only the way to the leader."""
        leader = f"r0={self.bed.hosts[0].address}:50052"
        command = ["frontend", "remuda-tiny", "--leaders", leader, "--secret-file", str(self.secret)]
        self._popen(self.bed.hosts[index], "front-end", command, {})

    def kill(self, index: int) -> None:
        """As the node's loss does: all processes of the pod at once."""
        for pid in self.bed.hosts[index].pids():
            os.kill(pid, signal.SIGKILL)
        self.running.pop(index).wait(10)

    def is_ready(self, index: int) -> bool:
        pod = self.bed.hosts[index]
        probe = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
        return pod.run([*probe, f"http://{pod.address}:8080/readyz"]).stdout == "200"

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_true():
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.5)

    def ask(self, index: int) -> str:
        """One question to the front end there."""
        command = [REMUDA, "chat", QUESTION, "--temperature", "0", "--max-tokens", "12", "--json"]
        done = self.bed.hosts[index].run(command, timeout_s=100)
        assert done.returncode == 0, f"{done.stderr}\n{self.logs()}"
        text: str = json.loads(done.stdout)["text"]
        return text

    def ranks(self, index: int) -> list[dict[str, Any]]:
        done = self.bed.hosts[index].run([REMUDA, "status", "--json"], timeout_s=60)
        assert done.returncode == 0, done.stderr
        (replica,) = json.loads(done.stdout)["replicas"]
        ranks: list[dict[str, Any]] = replica["ranks"]
        return ranks

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self.directory.glob("*.log")))

    def _popen(self, host: Host, name: str, command: list[str], variables: dict[str, str]) -> "subprocess.Popen[str]":
        with (self.directory / f"{name}.log").open("a") as log:
            environment = {**os.environ, **variables}
            return host.popen([REMUDA, *command], env=environment, stdout=log.fileno(), stderr=log.fileno())


@pytest.mark.timeout(290)
def test_a_group_serves_and_a_worker_pod_that_is_lost_comes_back(make_bed: MakeBed, tmp_path: Path) -> None:
    pods = Pods(make_bed(2), tmp_path)
    for index in (1, 0):  # a worker that is there before its leader waits for it
        pods.start(index)
    pods.start_front_end(0)
    pods.until(lambda: pods.is_ready(0))
    assert pods.is_ready(1)
    pods.until(lambda: "has joined" in (tmp_path / "front-end.log").read_text())
    assert pods.ask(0) == "Your name is Zora."
    before = pods.ranks(0)

    pods.kill(1)
    pods.until(lambda: not pods.is_ready(0))
    pods.start(1)
    assert pods.ask(0) == "Your name is Zora."  # a request that comes meanwhile waits
    after = pods.ranks(0)
    assert [rank["pid"] for rank in after[:2]] == [rank["pid"] for rank in before[:2]], "survivors stay"
    assert {rank["pid"] for rank in after[2:]} <= set(pods.bed.hosts[1].pids())

    for index in (0, 1):
        pods.running[index].terminate()
        assert pods.running[index].wait(60) == 0, pods.logs()
