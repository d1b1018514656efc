"""The key-value store in which a gang's ranks find each other: torch's TCPStore, on one address, without name look-ups.

A TCPStore's client asks the name server for the name behind the address of every connection, 127.0.0.1 too, to have it
for its messages (torch/csrc/distributed/c10d/socket.cpp). Where no name server answers, that also takes seconds.
"""

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# struct __res_state of <resolv.h>, which is part of glibc's ABI: int retrans, int retry, …
_RETRY_INDEX = 1


def serve_store(host: str, timeout_s: float) -> dist.TCPStore:
    """A new store that listens on ``host`` only, at a free port (``port``). torch's own would take every interface.

    Args:
        timeout_s: longest wait of a client for a key.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port: int = listener.getsockname()[1]
    with no_name_lookups():
        # It connects to itself.
        return dist.TCPStore(
            host,
            port,
            None,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def connect_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A client of the store at an address (a number, not a name). Raises RuntimeError where none answers in time."""
    with no_name_lookups():
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


@contextmanager
def no_name_lookups() -> Iterator[None]:
    """Let this thread ask no name server: glibc's resolver, whose state is per thread, then tries zero times."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "__res_state"):  # Not glibc: nothing of this kind to set.
        yield
        return
    libc.__res_state.restype = ctypes.POINTER(ctypes.c_int)
    if libc.__res_init() != 0:
        raise OSError("res_init failed: the resolver's configuration cannot be read")
    state = libc.__res_state()
    former = state[_RETRY_INDEX]
    state[_RETRY_INDEX] = 0
    try:
        yield
    finally:
        state[_RETRY_INDEX] = former
