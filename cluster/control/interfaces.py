"""Which network interface carries an address. Collectives are told a name (``GLOO_SOCKET_IFNAME``), not an address."""

import socket

import psutil

from engine.errors import LayoutError


def local_addresses() -> dict[str, str]:
    """Every IPv4 and IPv6 address of this host → the name of its interface. Link-local scopes are cut off."""
    found: dict[str, str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                found[entry.address.split("%")[0]] = name
    return found


def local_interface_for(address: str) -> str:
    """The interface of this host that carries ``address``, for example ``lo`` for 127.0.0.1.

    Raises:
        LayoutError: no interface here carries it; the message lists those that there are.
    """
    addresses = local_addresses()
    if address not in addresses:
        known = ", ".join(f"{name} {known_address}" for known_address, name in sorted(addresses.items()))
        raise LayoutError(f"no network interface of this host carries {address}; there are: {known}")
    return addresses[address]
