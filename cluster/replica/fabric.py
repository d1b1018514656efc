"""What a host has for talking to others, and which of it collectives are to use.

Read from the kernel's files: network interfaces, ports of RDMA adapters, and the NUMA nodes they are near.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

SYS = Path("/sys")


class Nic(msgspec.Struct, frozen=True):
    """A network interface that is up. ``mbit_per_s`` None: it does not know its speed. ``is_physical``: it belongs to a
    device, where bridges and tunnels do not."""

    name: str
    addresses: tuple[str, ...]
    mbit_per_s: int | None = None
    mtu: int = 1500
    is_physical: bool = False
    numa_node: int | None = None


class Hca(msgspec.Struct, frozen=True):
    """A port of an RDMA adapter. ``nic``: the network interface over it; empty where there is none."""

    name: str
    port: int
    is_active: bool
    gbit_per_s: float
    link_layer: str
    nic: str = ""
    numa_node: int | None = None


def local_addresses() -> dict[str, str]:
    """Every IPv4 and IPv6 address of this host → the name of its interface. Link-local scopes are cut off."""
    found: dict[str, str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                found[entry.address.split("%")[0]] = name
    return found


def network_interfaces(sys: Path = SYS) -> tuple[Nic, ...]:
    """Those that are up, the loopback too."""
    addresses: dict[str, list[str]] = {}
    for address, name in local_addresses().items():
        addresses.setdefault(name, []).append(address)
    found = []
    for name, state in sorted(psutil.net_if_stats().items()):
        if state.isup:
            device = sys / "class/net" / name / "device"
            speed = state.speed if state.speed > 0 else None
            own = tuple(addresses.get(name, ()))
            found.append(Nic(name, own, speed, state.mtu, device.exists(), numa_node(device)))
    return tuple(found)


def rdma_ports(sys: Path = SYS) -> tuple[Hca, ...]:
    return tuple(sorted(_rdma_ports(sys / "class/infiniband"), key=lambda port: (port.name, port.port)))


def _rdma_ports(adapters: Path) -> Iterator[Hca]:
    if not adapters.is_dir():
        return
    for adapter in adapters.iterdir():
        nics = sorted(path.name for path in (adapter / "device/net").glob("*"))
        for port in (adapter / "ports").glob("*"):
            # "4: ACTIVE", "400 Gb/sec (4X NDR)"
            yield Hca(
                name=adapter.name,
                port=int(port.name),
                is_active="ACTIVE" in _text(port / "state"),
                gbit_per_s=float((_text(port / "rate").split() or ["0"])[0]),
                link_layer=_text(port / "link_layer"),
                nic=nics[0] if nics else "",
                numa_node=numa_node(adapter / "device"),
            )


def numa_node(device: Path) -> int | None:
    """Of a PCI device; None where it is none, or the kernel does not know."""
    text = _text(device / "numa_node")
    return int(text) if text and int(text) >= 0 else None


def num_numa_nodes(sys: Path = SYS) -> int:
    return max(1, len(list((sys / "devices/system/node").glob("node[0-9]*"))))


def numa_cores(sys: Path = SYS) -> list[list[int]]:
    """The cores of each NUMA node, in order of node; [] where the kernel does not tell."""
    files = (sys / "devices/system/node").glob("node[0-9]*/cpulist")
    by_node = {int(file.parent.name.removeprefix("node")): _text(file) for file in files}
    return [_numbers(by_node[node]) for node in sorted(by_node)]


def _numbers(text: str) -> list[int]:
    """``0-1,4``."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # Many attributes cannot be read where a device has no link.
        return ""


def collective_environment(
    address: str, nics: Sequence[Nic], hcas: Sequence[Hca], given: Mapping[str, str]
) -> dict[str, str]:
    """The variables with which the ranks of the host at ``address`` find the right network; what is ``given`` stays.

    The interface is the one that carries the address which the other hosts use. RDMA ports are the active ones of the
    highest rate: a slower one among them, often that of a management network, would hold up the others.
    """
    chosen: dict[str, str] = {}
    carrier = next((nic.name for nic in nics if address in nic.addresses), None)
    if carrier is not None:
        # "=": the name as it is, not what begins with it.
        chosen = {"GLOO_SOCKET_IFNAME": carrier, "NCCL_SOCKET_IFNAME": f"={carrier}"}
    active = [port for port in hcas if port.is_active]
    if active and given.get("NCCL_IB_DISABLE", "0") in ("0", ""):
        fastest = max(port.gbit_per_s for port in active)
        # As above; without it mlx5_1 would also mean mlx5_10.
        names = ",".join(f"{port.name}:{port.port}" for port in active if port.gbit_per_s == fastest)
        chosen["NCCL_IB_HCA"] = f"={names}"
    return {name: given.get(name, value) for name, value in chosen.items()}
