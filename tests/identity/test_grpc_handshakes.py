"""Thousands of TLS connections to a gRPC server whose certificate may be replaced."""

import asyncio
import contextlib
import ssl
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.identity.authority import Authority, write_pair

NUM_CONNECTIONS, AT_ONCE = 5000, 24

_SERVER = """
import asyncio, sys
from pathlib import Path
import grpc
from cluster.identity.tls import ServerTls

async def main():
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", ServerTls(Path(sys.argv[1]), Path(sys.argv[2])).grpc_credentials())
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.timeout(90)
async def test_thousands_of_handshakes_at_once_do_not_end_the_server(tmp_path: Path) -> None:
    """Half of the connections are cut by the client. Where each handshake replaces the server's certificate with the
    same again, gRPC's library breaks after some 1,500 to 3,000 of them."""
    authority = Authority()
    files = map(str, write_pair(tmp_path, "server", authority.issue_for_host()))
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", _SERVER, *files, stdin=PIPE, stdout=PIPE)
    assert server.stdin is not None and server.stdout is not None
    port = int(await server.stdout.readline())

    num_connected = 0

    async def connect(number: int) -> None:
        nonlocal num_connected
        for _ in range(NUM_CONNECTIONS // AT_ONCE):
            with contextlib.suppress(OSError, ssl.SSLError):  # of a server that is gone: told below
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
                num_connected += 1
                if number % 2:
                    writer.transport.abort()
                else:
                    writer.close()

    await asyncio.gather(*map(connect, range(AT_ONCE)))
    assert server.returncode is None, f"the server ended with {server.returncode}"
    assert num_connected > NUM_CONNECTIONS * 0.99
    server.stdin.close()
    assert await server.wait() == 0
