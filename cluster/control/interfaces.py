"""Which network interface carries an address. Collectives are told a name (``GLOO_SOCKET_IFNAME``), not an address."""

from cluster.replica.fabric import local_addresses
from engine.errors import LayoutError


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
