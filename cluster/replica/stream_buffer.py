"""What waits on a front end for the reader of one stream."""

import asyncio

from cluster.replica.outputs import merge
from engine.errors import RemudaError
from engine.request import Output


class StreamBuffer:
    """At most one output, which grows while the reader is slow, and the error that ends the stream.

    So it holds at most the tokens of one request. Belongs to the event loop's thread; one reader.
    """

    __slots__ = ("_error", "_output", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._output: Output | None = None
        self._error: RemudaError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """``wake`` follows, at once or when more has come."""
        self._output = output if self._output is None else merge(self._output, output)

    def fail(self, error: RemudaError) -> None:
        """The stream ends with ``error`` once its reader has taken what came before. ``wake`` follows."""
        self._error = error

    def wake(self) -> None:
        # A reader that was cancelled leaves its waiter behind until its task runs again.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Output:
        """All that has come since the last call, at least one output. Raises the error that ended the stream."""
        while self._output is None:
            if self._error is not None:
                raise self._error
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        output, self._output = self._output, None
        return output
