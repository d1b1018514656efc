"""Faults of hosts and links: network namespaces with a real Ray over them, and a gang that spans two of them."""

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import authentication_environment
from tests.chaos.cell import Cell, Moment, Row, run_cell, unfaulted
from tests.chaos.clients import in_network
from tests.chaos.site import Site, live_requests
from tests.failover.processes import copy_model
from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host, end
from tests.support.served import REMUDA

READY_TIMEOUT_S = 120.0
SHORT_S, LONG_S = 2.0, 30.0
DELAY_MS, DELAYED_S = 200.0, 5.0
OPTIONS = ("--tp", "2", "--tp-across-hosts", "--max-num-batched-tokens", "64", "--deterministic")


@dataclass
class SeveralHosts:
    """A head without ranks, the host that serves with rank 0, and hosts of which one has rank 1."""

    bed: Bed
    nodes: list[RayNode]
    server: "subprocess.Popen[str]"
    log_file: Path

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
        return self.log_file.read_text()

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
        address = str(self.status()["ranks"][rank]["host"]).rpartition("(")[2].rstrip(")")
        return next(host for host in self.bed.hosts if host.address == address)

    def join_again(self, host: Host) -> None:
        """A host whose node Ray has given up becomes a new node."""
        (node,) = [node for node in self.nodes if node.paths.root.exists() and self._is_of(node, host)]
        node.close()
        self.nodes[self.nodes.index(node)] = self.bed.join_ray(self.nodes[0], host, 1)

    def _is_of(self, node: RayNode, host: Host) -> bool:
        return node.pid is not None and node.pid in host.pids()


@contextlib.contextmanager
def several_hosts(directory: Path) -> Iterator[SeveralHosts]:
    copy_model(directory / "model")
    log_file = directory / "serve.log"
    with Bed(4) as bed, log_file.open("w") as log:
        nodes = bed.start_ray(cpu_slots=(0, 1, 1, 1))
        command = [
            REMUDA,
            "serve",
            str(directory / "model"),
            "--served-model-name",
            "m",
            "--dtype",
            "float32",
            *OPTIONS,
        ]
        server = bed.hosts[1].popen(
            [*command, *OPTIONS, "--address", nodes[0].address],
            env={**os.environ, **authentication_environment(nodes[0].token_file)},
            stdout=log.fileno(),
            stderr=log.fileno(),
        )
        try:
            deadline_s = time.monotonic() + READY_TIMEOUT_S
            while "ready in" not in log_file.read_text():
                assert server.poll() is None and time.monotonic() < deadline_s, log_file.read_text()
                time.sleep(0.1)
            yield SeveralHosts(bed, nodes, server, log_file)
        finally:
            end(server)


def _on_rank_1(fault: Callable[[SeveralHosts, Host], None]) -> Callable[[Site], None]:
    """Where it is now, and never the host that serves."""

    def strike(site: Site) -> None:
        assert isinstance(site, SeveralHosts)
        host = site.host_of(1)
        assert host is not site.serving
        fault(site, host)

    return strike


def _link_down(seconds: float) -> Callable[[SeveralHosts, Host], None]:
    def fault(site: SeveralHosts, host: Host) -> None:
        site.bed.network.cut(host)
        time.sleep(seconds)  # the fault itself
        site.bed.network.heal(host)

    return fault


def _silence(seconds: float) -> Callable[[SeveralHosts, Host], None]:
    def fault(site: SeveralHosts, host: Host) -> None:
        site.bed.network.partition([host], [other for other in site.bed.hosts if other is not host])
        time.sleep(seconds)  # the fault itself
        site.bed.network.reunite()

    return fault


def _slow_link(site: SeveralHosts, host: Host) -> None:
    site.bed.network.delay(host, DELAY_MS)
    time.sleep(DELAYED_S)  # the fault itself
    site.bed.network.delay(host, 0)


def _kill_raylet(site: SeveralHosts, host: Host) -> None:
    _kill_of(site, host, "raylet/raylet")


def _kill_gcs(site: Site) -> None:
    assert isinstance(site, SeveralHosts)
    _kill_of(site, site.bed.hosts[0], "gcs_server")


def _kill_of(site: SeveralHosts, host: Host, program: str) -> None:
    (victim,) = [each for each in map(psutil.Process, host.pids()) if program in " ".join(each.cmdline()[:1])]
    victim.kill()


RANK_1 = frozenset({"rank 1"})
HEALING = [
    Cell(f"link down {SHORT_S:g} s", Moment.DECODE, _on_rank_1(_link_down(SHORT_S))),
    Cell(f"100 % loss {SHORT_S:g} s", Moment.DECODE, _on_rank_1(_silence(SHORT_S))),
    Cell(f"{DELAY_MS:g} ms delay for {DELAYED_S:g} s", Moment.DECODE, _on_rank_1(_slow_link)),
]
LASTING = [
    Cell("kill -9 raylet of rank 1", Moment.DECODE, _on_rank_1(_kill_raylet), RANK_1),
    Cell(f"link down {LONG_S:g} s", Moment.DECODE, _on_rank_1(_link_down(LONG_S)), RANK_1),
    Cell(f"100 % loss {LONG_S:g} s", Moment.PREFILL, _on_rank_1(_silence(LONG_S)), RANK_1),
]
HEAD = [Cell("kill -9 GCS, on a host without ranks", Moment.DECODE, _kill_gcs)]


def links(directory: Path) -> Iterator[Row]:
    """Faults that heal by themselves, and the head's at last."""
    yield from _struck(directory, [*HEALING, *HEAD])


def hosts(directory: Path) -> Iterator[Row]:
    """Faults that cost a host. Afterwards it joins again: it is the spare place of the next cell."""
    yield from _struck(directory, LASTING)


def _struck(directory: Path, cells: list[Cell]) -> Iterator[Row]:
    name = "tp2 over two hosts"
    with several_hosts(directory) as site:
        expected, rows = unfaulted(site, tuple(dict.fromkeys(cell.moment for cell in cells)))
        yield from (dataclasses.replace(row, site=name) for row in rows)
        for cell in cells:
            former = site.host_of(1)
            yield run_cell(name, site, cell, expected)
            if cell.replaced and cell is not cells[-1]:
                site.join_again(former)
