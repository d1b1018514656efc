"""A TCP connection that can be cut."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """Takes connections at ``address`` and passes them on; ``cut`` resets those that are open.

    Attributes:
        target: host:port of where new ones go.
        budgets: so many bytes each of the next connections brings back; then it stalls. However slow or fast its ends
            are, an answer that is longer has not come as a whole.
        num_stalled: those that did.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.budgets: deque[int] = deque()
        self.num_stalled = 0
        self._open: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.num_connections = 0

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        both = {writer, far_writer}
        self._open |= both
        try:
            await asyncio.gather(_copy(reader, far_writer), self._bring_back(far_reader, writer))
        finally:
            self._open -= both
            for each in both:
                each.transport.abort()

    async def _bring_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.budgets.popleft() if self.budgets else None
        while left:
            data = await reader.read(left)
            writer.write(data)
            await writer.drain()
            left = left - len(data) if data else 0
        if left is None:
            await _copy(reader, writer)
            return
        self.num_stalled += 1
        while await reader.read(65536):  # it is lost
            pass
        writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def wire_to(target: str) -> AsyncIterator[Wire]:
    wire = Wire(target)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    wire.address = f"{host}:{port}"
    try:
        yield wire
    finally:
        server.close()
        wire.cut()
