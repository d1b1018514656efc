"""What every streaming gRPC method of the front end shares."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc

from cluster.errors import DeadlineExceeded
from cluster.frontend.live_request import overdue

Context = grpc.aio.ServicerContext[Any, Any]


async def until_overdue(writing: Coroutine[Any, Any, None], failed: asyncio.Event) -> None:
    """Write a request's answer.

    Args:
        writing: does it.
        failed: set when the request has failed.

    Raises:
        RemudaError: the request's, as ``writing`` raises it.
        DeadlineExceeded: the client does not read, and its request has failed.
    """
    writer = asyncio.create_task(writing)
    late = asyncio.create_task(overdue(failed))
    try:
        await asyncio.wait({writer, late}, return_when=asyncio.FIRST_COMPLETED)
        if not writer.done():
            raise DeadlineExceeded("the request ended while the client did not read its answer")
        writer.result()
    finally:
        writer.cancel()
        late.cancel()
        await asyncio.gather(writer, late, return_exceptions=True)
        # A task keeps its error, and the error's trace this frame: let them go without the garbage collector.
        del writer, late
