"""The bed's switch and cables, and what can go wrong with them.

One bridge in a namespace of its own; each host's cable is a veth pair, ``eth0`` in the host and ``pN`` at the switch.

=================  =============================================================================================
cut                the switch's port goes down: both ends see the carrier go
delay              ``pN`` leaves the bridge, a process in user space (wire.py) carries its frames to a TAP ``wN``
limit              a token bucket (``tc tbf``) at both ends of the cable
lose, drop         nftables rules of the bridge family: nobody sees a carrier go, frames just do not arrive
=================  =============================================================================================

``eth0`` stays what it is throughout, with its address: a changed one would leave stale ARP entries behind.
"""

import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from tests.support.hosts.host import Host, end
from tests.support.hosts.namespaces import call, ip

BRIDGE = "br0"
_WIRE = Path(__file__).with_name("wire.py")
_LIMIT_QUEUE_MS = 50
_MIN_BURST_BYTES = 16_000
_PER_MILLION = 1_000_000
_ONE_FRAME_SEGMENTS = "1"
_DEFAULT_SEGMENTS = "65535"


class Network:
    """``switch`` is the name of the bridge's namespace."""

    def __init__(self, switch: str) -> None:
        self.switch = switch
        self._wires: dict[Host, subprocess.Popen[str]] = {}
        self._lost: dict[tuple[Host, Host], float] = {}
        """(from, to) → the share of frames that do not arrive."""

    def make(self) -> None:
        """The switch, in its namespace, which must exist."""
        # Nothing of the switch's own speaks: not even router solicitations.
        quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"
        call(["ip", "netns", "exec", self.switch, "sh", "-c", quiet])
        ip("-n", self.switch, "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", BRIDGE, "up")

    def plug(self, host: Host) -> None:
        """Lay the host's cable and give it its addresses."""
        port = f"p{host.number}"
        ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        ip("-n", self.switch, "link", "set", port, "master", BRIDGE, "up")
        for line in (
            "link set lo up",
            "link set eth0 up",
            f"addr add {host.address}/24 dev eth0",
            f"addr add {host.address6}/64 dev eth0 nodad",
        ):
            ip("-n", host.name, *line.split())

    def cut(self, host: Host) -> None:
        """Pull the host's cable."""
        ip("-n", self.switch, "link", "set", f"p{host.number}", "down")

    def heal(self, host: Host) -> None:
        """Plug the host's cable in again. Loss, limits and delays stay."""
        ip("-n", self.switch, "link", "set", f"p{host.number}", "up")

    def delay(self, host: Host, one_way_ms: float) -> None:
        """Frames from and to the host take so long each way. 0: as they were. Raises RuntimeError; they are as they
        were then, too."""
        port, tap = f"p{host.number}", f"w{host.number}"
        if (former := self._wires.pop(host, None)) is not None:
            end(former)
            ip("-n", self.switch, "link", "set", port, "master", BRIDGE)
        if one_way_ms == 0:
            return
        enter = ["ip", "netns", "exec", self.switch]
        command = [*enter, sys.executable, "-SE", str(_WIRE), port, tap, str(one_way_ms / 1000)]
        wire = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        try:
            assert wire.stdout is not None
            if wire.stdout.readline() != "up\n":
                raise RuntimeError(f"the wire of {host.name} did not start")
            ip("-n", self.switch, "link", "set", port, "nomaster")
            ip("-n", self.switch, "link", "set", tap, "master", BRIDGE, "up")
        except BaseException:
            end(wire)
            ip("-n", self.switch, "link", "set", port, "master", BRIDGE)
            raise
        self._wires[host] = wire

    def limit(self, host: Host, mbit_per_s: float | None) -> None:
        """What the host sends, and what it is sent, at most. None: no limit."""
        for namespace, device in ((self.switch, f"p{host.number}"), (host.name, "eth0")):
            tc = ["tc", "-n", namespace, "qdisc"]
            if mbit_per_s is None:
                call([*tc, "del", "dev", device, "root"])
                continue
            burst_bytes = max(_MIN_BURST_BYTES, int(mbit_per_s * 1e6 / 8 / 250))
            bucket = f"tbf rate {mbit_per_s}mbit burst {burst_bytes} latency {_LIMIT_QUEUE_MS}ms"
            call([*tc, "replace", "dev", device, "root", *bucket.split()])

    def lose(self, host: Host, share: float, others: Iterable[Host]) -> None:
        """So many of the frames between the host and the others are lost, chosen at random, both ways.

        The kernel hands 64 KB at once from host to host, which no real network does; a loss would take all of it. So
        both ends send in frames from now on.
        """
        for other in others:
            self._lost[host, other] = self._lost[other, host] = share
            for end_host in (host, other):
                ip("-n", end_host.name, "link", "set", "eth0", "gso_max_segs", _ONE_FRAME_SEGMENTS)
        self._apply()

    def drop(self, source: Host, target: Host) -> None:
        """Nothing that ``source`` sends reaches ``target``. Nobody is told."""
        self._lost[source, target] = 1.0
        self._apply()

    def partition(self, *groups: Iterable[Host]) -> None:
        """Hosts reach those of their own group only. Nobody is told."""
        for group, other_group in combinations([list(group) for group in groups], 2):
            for host in group:
                for other in other_group:
                    self._lost[host, other] = self._lost[other, host] = 1.0
        self._apply()

    def reunite(self) -> None:
        """End all losses, drops and partitions."""
        hosts = {host for pair in self._lost for host in pair}
        self._lost.clear()
        self._apply()
        for host in hosts:
            ip("-n", host.name, "link", "set", "eth0", "gso_max_segs", _DEFAULT_SEGMENTS)

    def _apply(self) -> None:
        """All rules at once: nftables takes a file of them as one transaction."""
        rules = [
            f"iifname {_ports(source)} oifname {_ports(target)} {_chance(share)}drop"
            for (source, target), share in self._lost.items()
        ]
        text = "add table bridge remuda\ndelete table bridge remuda\ntable bridge remuda {\nchain forward {\n"
        text += "type filter hook forward priority 0; policy accept;\n" + "\n".join(rules) + "\n}\n}\n"
        call(["ip", "netns", "exec", self.switch, "nft", "-f", "-"], text)

    def close(self) -> None:
        """End the wires; the rest goes with the namespaces."""
        while self._wires:
            end(self._wires.popitem()[1])


def _ports(host: Host) -> str:
    return f'{{ "p{host.number}", "w{host.number}" }}'


def _chance(share: float) -> str:
    return "" if share >= 1 else f"numgen random mod {_PER_MILLION} < {round(share * _PER_MILLION)} "
