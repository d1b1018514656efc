"""Network namespaces as hosts with one Ray over them, and a gang that spans two of them.

The head has no ranks, the second host serves and has rank 0, the third has rank 1, and the fourth is the place to which
a rank can move.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import authentication_environment
from tests.chaos.clients import in_network
from tests.chaos.site import live_requests
from tests.failover.processes import copy_model
from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host, end
from tests.support.served import REMUDA

READY_TIMEOUT_S = 120.0
CPU_SLOTS = (0, 1, 1, 1)
OPTIONS = ("--tp", "2", "--tp-across-hosts", "--max-num-batched-tokens", "64", "--deterministic")


@dataclass
class RayHosts:
    """``nodes``, ``cpu_slots``: of the hosts, in order."""

    bed: Bed
    nodes: list[RayNode]
    directory: Path
    cpu_slots: Sequence[int] = CPU_SLOTS

    def join_again(self, host: Host) -> None:
        """A host whose node Ray has given up becomes a new node."""
        index = self.bed.hosts.index(host)
        self.nodes[index].close()
        self.nodes[index] = self.bed.join_ray(self.nodes[0], host, self.cpu_slots[index])


@contextlib.contextmanager
def ray_hosts(directory: Path) -> Iterator[RayHosts]:
    copy_model(directory / "model")
    with Bed(len(CPU_SLOTS)) as bed:
        yield RayHosts(bed, bed.start_ray(cpu_slots=CPU_SLOTS), directory)


@dataclass
class SeveralHosts:
    """One ``remuda serve`` on these hosts; see tests.chaos.site.Site. A context manager: begun at entry, ended at
    exit."""

    hosts: RayHosts
    server: "subprocess.Popen[str]" = field(init=False)
    whole: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "SeveralHosts":
        self._log_file = self.hosts.directory / "serve.log"
        command = [REMUDA, "serve", str(self.hosts.directory / "model"), "--served-model-name", "m", *OPTIONS]
        head = self.hosts.nodes[0]
        with self._log_file.open("w") as log:
            self.server = self.serving.popen(
                [*command, "--dtype", "float32", "--address", head.address],
                env={**os.environ, **authentication_environment(head.token_file)},
                stdout=log.fileno(),
                stderr=log.fileno(),
            )
        return self

    def __exit__(self, *exception: object) -> None:
        end(self.server)

    def wait_for(self, words: str) -> None:
        """In the log."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while words not in self.log:
            assert self.server.poll() is None and time.monotonic() < deadline_s, self.log
            time.sleep(0.05)

    @property
    def bed(self) -> Bed:
        return self.hosts.bed

    @property
    def serving(self) -> Host:
        return self.bed.hosts[1]

    @property
    def network(self) -> Path:
        return self.serving.network

    @property
    def urls(self) -> list[str]:
        return ["http://127.0.0.1:8000"]

    @property
    def log(self) -> str:
        return self._log_file.read_text()

    @property
    def exit_status(self) -> int | None:
        return self.server.poll()

    def status(self) -> dict[str, Any]:
        done = self.serving.run([REMUDA, "status", "--json"], timeout_s=60)
        assert done.returncode == 0, done.stderr
        replica: dict[str, Any] = json.loads(done.stdout)["replicas"][0]
        return replica

    def processes(self) -> list[psutil.Process]:
        found = []
        for host in self.bed.hosts:
            for pid in host.pids():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def num_live(self) -> int:
        return in_network(self.network, lambda: live_requests(self.urls[0]))

    def host_of(self, rank: int) -> Host:
        """When the cluster was last seen whole."""
        return next(host for host in self.bed.hosts if self.whole[f"rank {rank}"] in host.pids())


@contextlib.contextmanager
def several_hosts(directory: Path) -> Iterator[SeveralHosts]:
    """Ready."""
    with ray_hosts(directory) as hosts, SeveralHosts(hosts) as site:
        site.wait_for("ready in")
        yield site
