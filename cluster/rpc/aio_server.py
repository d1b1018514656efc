"""gRPC servers that no call can end.

grpcio from 1.83 on decodes the name of a called method in the loop that takes all calls: one name that is not UTF-8,
from anybody who reaches the port, ends the server. Names that are registered are not decoded from the wire, and all
methods of ours are registered; so what comes without a registered name is refused here, before the loop sees it.
"""

import asyncio
import logging
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_NAMELESS = "not a method"
"""In the place of a name that may be none."""


class _Unquoted(logging.Filter):
    """grpcio logs metadata that is not UTF-8 as it came: of a key with one wrong byte all the others."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Invalid encoding on")


logging.getLogger(cygrpc.__name__).addFilter(_Unquoted())


def make_server(**arguments: Any) -> grpc.aio.Server:
    """As ``grpc.aio.server``, for services that generated code adds (``add_…Servicer_to_server`` registers methods);
    others answer UNIMPLEMENTED."""
    plain = cygrpc.AioServer
    # The class is named nowhere but in the constructor of grpc.aio's server, and that takes no other.
    cygrpc.AioServer = _Enduring
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = plain


class _Enduring(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any) -> None:
        super().__init__(loop, *arguments)
        self._own_loop = loop
        self._no_methods = cygrpc._MethodResolver([], {})
        self._refusing: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> None:
        """What gRPC's loop waits on for the next call of no registered method. Returns none; raises as it did."""
        while True:
            call = await super()._request_call()
            loop = self._own_loop
            refusal = cygrpc._handle_rpc(_NAMELESS, self._no_methods, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, _NAMELESS))
            self._refusing.add(task)
            task.add_done_callback(self._refusing.discard)
