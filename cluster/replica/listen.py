"""Where a leader's server listens: at the port that front ends know, if it can be had."""

import asyncio

import grpc

from cluster.errors import StartFailed

PORT_INTERVAL_S = 0.2


async def listen(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None,
    *,
    needs_port: bool = True,
    wait_s: float = 0.0,
) -> int:
    """The port. Before ``server`` is started.

    Args:
        address: host:port; port 0 takes a free one.
        credentials: for TLS; None listens in plain text.
        needs_port: whether that port being in use is an error. Otherwise another one is taken then.
        wait_s: for whoever has the port now, and is being ended.

    Raises:
        StartFailed: the port is in use.
    """
    now_s = asyncio.get_running_loop().time
    until_s = now_s() + wait_s
    while True:
        try:
            return _add_port(server, address, credentials)
        except RuntimeError as error:
            failure = error
        if now_s() >= until_s:
            break
        await asyncio.sleep(PORT_INTERVAL_S)  # nobody tells when another process has let go of it
    if needs_port:
        raise StartFailed(f"the leader cannot listen at {address}: {failure}; choose a free port") from failure
    return _add_port(server, f"{address.rpartition(':')[0]}:0", credentials)


def _add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Raises RuntimeError where it is in use."""
    return server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
