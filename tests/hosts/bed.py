"""Hosts on one machine: network namespaces with an address each, joined by a bridge in a namespace of its own.

So that no test network exists outside the bed, and none leads out of it. Everything that runs in a host is found and
ended by namespace when the bed closes, whatever became of the processes that started it. Needs root and iproute2.
"""

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import NodeSpec

PREFIX = "rmd"
NETWORK = "10.77.0."
NETWORK6 = "fd77::"
GATEWAY_NUMBER = 254
# A name server outside, so that a look-up is a packet that leaves the host, whatever this machine's resolver is.
NAME_SERVER = "203.0.113.53"
NETNS_ETC = Path("/etc/netns")
END_GRACE_S = 2.0

_numbers = itertools.count()


def ip(*arguments: str) -> str:
    """Run ``ip`` and return its output."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@cache
def why_not() -> str | None:
    """Why no bed can be made here; None where one can."""
    if shutil.which("ip") is None:
        return "needs the Debian package iproute2"
    if os.geteuid() != 0:
        return "network namespaces are not permitted here: not root"
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "probe", "type", "bridge")
        finally:
            ip("netns", "del", name)
    except RuntimeError as error:
        return f"network namespaces are not permitted here: {error}"
    return None


class Host:
    """One namespace: the address ``address`` on ``eth0``, its own loopback, and whatever is run in it."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.address = f"{NETWORK}{number}"
        self.address6 = f"{NETWORK6}{number:x}"
        self.started: list[subprocess.Popen[str]] = []

    @property
    def prefix(self) -> list[str]:
        """Put before a command to run it in the host. ``ip netns exec`` becomes the command: no process in between."""
        return ["ip", "netns", "exec", self.name]

    def run(
        self, command: Sequence[str], *, timeout_s: float = 30.0, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the host to its end."""
        return subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )

    def popen(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.STDOUT,
    ) -> "subprocess.Popen[str]":
        """Start a command in the host. What is still running when the bed closes is ended."""
        process = subprocess.Popen(
            [*self.prefix, *command], env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=True
        )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Every process in the host."""
        return [int(line) for line in ip("netns", "pids", self.name).split()]


class Bed:
    """``num_hosts`` hosts, 10.77.0.1 and up. A context manager; also closed at exit.

    Args:
        with_sink: every host gets a default route, IPv4 and IPv6, to a further namespace that answers nothing:
            what would leave the machine arrives there (``sink``, see sniffer.py).
    """

    def __init__(self, num_hosts: int = 3, *, with_sink: bool = False) -> None:
        sweep()
        self._base = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._base}-net"
        self.hosts = [Host(f"{self._base}-h{number}", number) for number in range(1, num_hosts + 1)]
        self.sink = Host(f"{self._base}-sink", GATEWAY_NUMBER) if with_sink else None
        self._ray_nodes: list[RayNode] = []
        self._closed = False
        atexit.register(self.close)
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        everyone = self.hosts + ([self.sink] if self.sink else [])
        for name in (self._switch, *(host.name for host in everyone)):
            ip("netns", "add", name)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for host in everyone:
            self._connect(host)

    def _connect(self, host: Host) -> None:
        """Plug the host's cable in and give it addresses and, with a sink, routes."""
        port = f"p{host.number}"
        ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        in_host = [
            "link set lo up",
            "link set eth0 up",
            f"addr add {host.address}/24 dev eth0",
            f"addr add {host.address6}/64 dev eth0 nodad",
        ]
        if self.sink is not None and host is not self.sink:
            in_host += [
                f"route add default via {self.sink.address}",
                f"-6 route add default via {self.sink.address6}",
            ]
            # Bind-mounted over /etc by ``ip netns exec``.
            directory = NETNS_ETC / host.name
            directory.mkdir(parents=True)
            (directory / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\noptions timeout:1 attempts:1\n")
        for line in in_host:
            ip("-n", host.name, *line.split())

    def cut(self, host: Host) -> None:
        """Pull the host's cable."""
        ip("-n", self._switch, "link", "set", f"p{host.number}", "down")

    def heal(self, host: Host) -> None:
        ip("-n", self._switch, "link", "set", f"p{host.number}", "up")

    def start_ray(self, *, cpu_slots: int | Sequence[int], hosts: Sequence[Host] | None = None) -> list[RayNode]:
        """One real Ray cluster over the hosts, with the settings of production; the first host is the head.

        Args:
            cpu_slots: of every host, or of each.

        Returns:
            the nodes, the head's first; ``nodes[0].address`` and ``.token_file`` are what a driver needs.
        """
        head, *others = hosts or self.hosts
        each = [cpu_slots] * (1 + len(others)) if isinstance(cpu_slots, int) else list(cpu_slots)
        spec = NodeSpec(node_ip=head.address, cpu_slots=each[0], several_hosts=True)
        head_node = RayNode.start(spec, command_prefix=head.prefix)
        self._ray_nodes.append(head_node)

        def join(host: Host, slots: int) -> RayNode:
            spec = NodeSpec(host.address, slots, head_address=head_node.address, several_hosts=True)
            node = RayNode.start(spec, token_file=head_node.token_file, command_prefix=host.prefix)
            self._ray_nodes.append(node)
            return node

        with ThreadPoolExecutor(len(others) or 1) as pool:
            return [head_node, *pool.map(join, others, each[1:])]

    def close(self) -> None:
        """Stop Ray, end every process in the hosts and remove the namespaces. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            # The others first: a worker node that loses its head complains and lingers.
            for node in reversed(self._ray_nodes):
                node.close()
        finally:
            for process in itertools.chain.from_iterable(host.started for host in self.hosts):
                end(process)
            remove_namespaces(self._base)

    def __enter__(self) -> "Bed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def namespaces() -> list[str]:
    """Names of the network namespaces that beds of this machine have made."""
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def pids_in(names: Sequence[str]) -> set[int]:
    return {int(pid) for name in names for pid in ip("netns", "pids", name).split()}


def remove_namespaces(base: str) -> None:
    """End every process in the namespaces of one bed, then remove them."""
    names = [name for name in namespaces() if name.startswith(f"{base}-")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_GRACE_S
        told: set[int] = set()
        while (pids := pids_in(names)) and time.monotonic() < deadline:
            for pid in pids - told:
                send_signal(pid, number)
            told |= pids
            time.sleep(0.02)
    for name in names:
        ip("netns", "del", name)
        shutil.rmtree(NETNS_ETC / name, ignore_errors=True)


def end(process: "subprocess.Popen[str]") -> None:
    """End a process that we started, collect it and close its pipes."""
    process.terminate()
    try:
        process.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def send_signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def sweep() -> None:
    """Remove what beds of dead processes left, for example after SIGKILL."""
    bases = {"-".join(name.split("-")[:3]) for name in namespaces()}
    for base in bases:
        if not Path("/proc", base.split("-")[1]).exists():
            remove_namespaces(base)
