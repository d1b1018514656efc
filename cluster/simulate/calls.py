"""gRPC's place in the simulation: the stub that a client uses and the context that a servicer gets, over a connection.

One connection carries one call. Messages go through their wire form. What the real library raises is raised here too.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from cluster.simulate.network import Broken, End
from cluster.simulate.process import Process

STREAMING = frozenset({"Attach"})
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

Metadata = Iterable[tuple[str, str]]


def _failed(code: grpc.StatusCode, message: str, trailing: Metadata = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=message)


def _copied(message: Any) -> Any:
    """What travels is bytes: nothing is shared between processes."""
    return type(message).FromString(message.SerializeToString())


class _Aborted(Exception):
    """The servicer ended the call with a status."""


class StreamCall:
    """The client's side of a stream of messages in both directions."""

    def __init__(self, process: Process, address: str, method: str, metadata: Metadata) -> None:
        self._opening = process.spawn(self._open(process, address, method, tuple(metadata)))
        self._end: End | None = None

    async def _open(self, process: Process, address: str, method: str, metadata: Metadata) -> End:
        end = await process.connect(address)
        end.send(("call", method, metadata, None))
        return end

    async def _connected(self) -> End:
        try:
            return await asyncio.shield(self._opening)
        except Broken as error:
            raise _failed(_UNAVAILABLE, str(error)) from None

    async def write(self, message: Any) -> None:
        end = await self._connected()
        try:
            end.send(("message", _copied(message)))
        except Broken as error:
            raise _failed(_UNAVAILABLE, str(error)) from None

    async def __aiter__(self) -> AsyncIterator[Any]:
        end = await self._connected()
        while True:
            try:
                kind, *rest = await end.receive()
            except Broken as error:
                raise _failed(_UNAVAILABLE, str(error)) from None
            if kind == "message":
                yield rest[0]
            elif kind == "end":
                return
            else:
                raise _failed(*rest)

    def cancel(self) -> None:
        self._opening.cancel()
        if self._opening.done() and not self._opening.cancelled() and self._opening.exception() is None:
            self._opening.result()._connection.break_off("the call was cancelled")


class SimulatedStub:
    """Every rpc of a service at ``address``, called from ``process``."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self._address = address

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        if method in STREAMING:
            return lambda metadata=(): StreamCall(self._process, self._address, method, metadata)
        return lambda request, timeout=None, metadata=(): self._unary(method, request, timeout, tuple(metadata))

    async def _unary(self, method: str, request: Any, timeout_s: float | None, metadata: Metadata) -> Any:
        end: End | None = None
        try:
            async with asyncio.timeout(timeout_s):
                end = await self._process.connect(self._address)
                end.send(("call", method, metadata, _copied(request)))
                kind, *rest = await end.receive()
        except TimeoutError:
            raise _failed(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {timeout_s} s") from None
        except Broken as error:
            raise _failed(_UNAVAILABLE, str(error)) from None
        finally:
            if end is not None:
                end._connection.break_off("the call has ended")
        if kind == "message":
            return rest[0]
        raise _failed(*rest)


class _Context:
    """What a servicer's method needs of grpc.aio.ServicerContext."""

    def __init__(self, end: End, metadata: Metadata) -> None:
        self._end = end
        self._metadata = metadata

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    async def write(self, message: Any) -> None:
        try:
            self._end.send(("message", _copied(message)))
        except Broken:
            raise asyncio.CancelledError from None
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        with contextlib.suppress(Broken):  # nobody is left to hear it
            self._end.send(("failed", code, details, tuple(trailing_metadata)))
        raise _Aborted


async def serve_call(servicer: Any, end: End) -> None:
    """Runs the servicer's method for one connection, to its end or the connection's."""
    try:
        _, method, metadata, request = await end.receive()
    except Broken:
        return
    context = _Context(end, metadata)
    try:
        if method in STREAMING:
            await _serve_stream(getattr(servicer, method), end, context)
        else:
            end.send(("message", _copied(await getattr(servicer, method)(request, context))))
    except (_Aborted, Broken):
        pass


async def _serve_stream(method: Any, end: End, context: _Context) -> None:
    """As gRPC does: the handler is cancelled when the connection breaks."""
    requests: asyncio.Queue[Any] = asyncio.Queue()

    async def received() -> AsyncIterator[Any]:
        while (message := await requests.get()) is not None:
            yield message

    async def handle() -> None:
        try:
            await method(received(), context)
        except _Aborted:
            return
        with contextlib.suppress(Broken):  # it ended by itself at the same time
            end.send(("end",))

    handler = asyncio.ensure_future(handle())
    arrival = asyncio.ensure_future(end.receive())
    try:
        while not handler.done():
            await asyncio.wait({arrival, handler}, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done():
                requests.put_nowait(arrival.result()[1])
                arrival = asyncio.ensure_future(end.receive())
    finally:
        for task in (handler, arrival):
            task.cancel()
        await asyncio.gather(handler, arrival, return_exceptions=True)
    if not handler.cancelled() and (error := handler.exception()) is not None:
        raise error
