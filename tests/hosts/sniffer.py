"""Records every packet that leaves the hosts of a bed: what arrives at its sink, to which their default routes lead."""

import ctypes
import ipaddress
import os
import select
import socket
import struct
import threading
from dataclasses import dataclass

from tests.support.hosts.host import NETWORK, NETWORK6, Host

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
RECEIVE_BUFFER_BYTES = 8 * 1024 * 1024
PROTOCOL_NAMES = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
# Neighbour and multicast listener discovery, which the kernel does by itself; an echo request is not among them.
KERNEL_ICMPV6_TYPES = {*range(130, 138), 143}
OUR_NETWORKS = (ipaddress.ip_network(f"{NETWORK}0/24"), ipaddress.ip_network(f"{NETWORK6}/64"))


@dataclass(frozen=True)
class Packet:
    """One IP packet. ``port`` is the destination's; 0 where the protocol has none."""

    source: str
    destination: str
    protocol: str
    port: int
    payload: bytes

    def __str__(self) -> str:
        name = f" {question(self.payload)!r}" if self.protocol == "udp" and self.port == 53 else ""
        return f"{self.protocol} {self.source} → {self.destination}:{self.port}{name}"


class Sniffer:
    """A raw socket in the sink and a thread that reads it. A context manager; ``packets`` grows while it is open."""

    def __init__(self, sink: Host) -> None:
        self._socket = packet_socket(sink)
        self._wake, self._stop = os.pipe()
        self._packets: list[Packet] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def packets(self) -> list[Packet]:
        """What has left the hosts so far: no traffic among them, and not what their kernels say to their neighbours."""
        return [packet for packet in self._packets if is_outward(packet)]

    def _read(self) -> None:
        while True:
            readable, _, _ = select.select([self._socket, self._wake], [], [])
            # What has arrived is read before the end is heeded.
            if self._socket in readable:
                frame, (_, kind, *_) = self._socket.recvfrom(65536)
                packet = parse(kind, frame)
                if packet is not None:
                    self._packets.append(packet)
            elif self._wake in readable:
                return

    def close(self) -> None:
        os.close(self._stop)
        self._thread.join()
        # Packets that the kernel dropped for want of room would be packets unseen.
        dropped = struct.unpack("II", self._socket.getsockopt(263, 6, 8))[1]
        self._socket.close()
        os.close(self._wake)
        assert dropped == 0, f"the sniffer missed {dropped} packets"

    def __enter__(self) -> "Sniffer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def packet_socket(host: Host) -> socket.socket:
    """An AF_PACKET socket inside the host's namespace. A socket stays in the namespace it was made in."""
    made: list[socket.socket | OSError] = []

    def make() -> None:
        # setns moves one thread, and this one ends here.
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/run/netns/{host.name}", os.O_RDONLY)
        try:
            if libc.setns(descriptor, CLONE_NEWNET) != 0:
                made.append(OSError(ctypes.get_errno(), "setns failed"))
                return
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
            raw.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER_BYTES)  # SO_RCVBUFFORCE
            made.append(raw)
        except OSError as error:
            made.append(error)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def parse(kind: int, data: bytes) -> Packet | None:
    """An IPv4 or IPv6 packet; None for anything else, such as ARP."""
    if kind == ETH_P_IP:
        number, source, destination = data[9], data[12:16], data[16:20]
        body = data[4 * (data[0] & 0xF) :]
    elif kind == ETH_P_IPV6:
        number, source, destination = data[6], data[8:24], data[24:40]
        body = data[40:]
        if number == 0:  # hop-by-hop options, before multicast listener reports
            number, body = body[0], body[8 * (body[1] + 1) :]
    else:
        return None
    protocol = PROTOCOL_NAMES.get(number, str(number))
    port = struct.unpack("!H", body[2:4])[0] if protocol in ("tcp", "udp") else 0
    payload = body[8:] if protocol == "udp" else body
    return Packet(str(ipaddress.ip_address(source)), str(ipaddress.ip_address(destination)), protocol, port, payload)


def is_outward(packet: Packet) -> bool:
    """Whether a packet leaves the hosts: not for one of them, and not their kernels' own multicast housekeeping."""
    if any(ipaddress.ip_address(packet.destination) in network for network in OUR_NETWORKS):
        return False
    if packet.protocol == "igmp":
        return False
    return not (packet.protocol == "icmpv6" and packet.payload[0] in KERNEL_ICMPV6_TYPES)


def question(payload: bytes) -> str:
    """The name that a DNS query asks for."""
    labels, position = [], 12
    while position < len(payload) and (length := payload[position]):
        labels.append(payload[position + 1 : position + 1 + length].decode(errors="replace"))
        position += 1 + length
    return ".".join(labels)
