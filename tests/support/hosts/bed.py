"""Hosts on one machine: network namespaces with an address each, joined by a bridge in a namespace of its own.

So that no test network exists outside the bed, and none leads out of it. Everything that runs in a host is found and
ended by namespace when the bed closes, whatever became of the processes that started it. Needs root, iproute2 and
nftables.
"""

import atexit
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cluster.control.ray_node import RayNode
from cluster.control.ray_settings import NodeSpec
from tests.support.hosts.host import Host
from tests.support.hosts.namespaces import NETNS_ETC, base_name, ip, remove_namespaces, sweep
from tests.support.hosts.network import Network

SINK_NUMBER = 254
# A name server outside, so that a look-up is a packet that leaves the host, whatever this machine's resolver is.
NAME_SERVER = "203.0.113.53"

_numbers = itertools.count(1)


class Bed:
    """``num_hosts`` hosts, 10.77.0.1 and up. A context manager; also closed at exit.

    Args:
        with_sink: every host gets a default route, IPv4 and IPv6, to a further namespace that answers nothing:
            what would leave the machine arrives there (``sink``, see tests/hosts/sniffer.py).

    Attributes:
        network: where links are cut, delayed, limited, made lossy and partitioned.
    """

    def __init__(self, num_hosts: int = 3, *, with_sink: bool = False) -> None:
        sweep()
        self._base = base_name(next(_numbers))
        self._switch = f"{self._base}-net"
        self.hosts = [Host(f"{self._base}-h{number}", number) for number in range(1, num_hosts + 1)]
        self.sink = Host(f"{self._base}-sink", SINK_NUMBER) if with_sink else None
        self.network = Network(self._switch)
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
        self.network.make()
        for host in everyone:
            self.network.plug(host)
        if self.sink is not None:
            for host in self.hosts:
                self._lead_out(host, self.sink)

    def _lead_out(self, host: Host, sink: Host) -> None:
        """Whatever would leave the host's network goes to the sink."""
        ip("-n", host.name, "route", "add", "default", "via", sink.address)
        ip("-n", host.name, "-6", "route", "add", "default", "via", sink.address6)
        directory = NETNS_ETC / host.name
        directory.mkdir(parents=True)
        (directory / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\noptions timeout:1 attempts:1\n")

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

        with ThreadPoolExecutor(len(others) or 1) as pool:
            return [head_node, *pool.map(partial(self.join_ray, head_node), others, each[1:])]

    def join_ray(self, head_node: RayNode, host: Host, cpu_slots: int) -> RayNode:
        """One more node of the cluster."""
        spec = NodeSpec(host.address, cpu_slots, head_address=head_node.address, several_hosts=True)
        node = RayNode.start(spec, token_file=head_node.token_file, command_prefix=host.prefix)
        self._ray_nodes.append(node)
        return node

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
            self.network.close()
            for host in self.hosts:
                host.close()
            remove_namespaces(self._base)

    def __enter__(self) -> "Bed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
