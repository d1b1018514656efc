"""What waits on a front end for the reader of one stream."""

import asyncio

from cluster.replica.outputs import merge
from engine.errors import RemudaError
from engine.request import Output


class StreamBuffer:
    """What has come since the reader last asked, and the error that ends the stream.

    It holds at most the tokens of one request. Belongs to the event loop's thread; one reader.
    """

    __slots__ = ("_error", "_outputs", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outputs: list[Output] = []
        self._error: RemudaError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """``wake`` follows, at once or when more has come."""
        self._outputs.append(output)

    def fail(self, error: RemudaError) -> None:
        """The stream ends with ``error`` once its reader has taken what came before. ``wake`` follows."""
        self._error = error

    def wake(self) -> None:
        # A reader that was cancelled leaves its waiter behind until its task runs again.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Output:
        """All that has come since the last call, as one output. Raises the error that ended the stream."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        outputs, self._outputs = self._outputs, []
        return outputs[0] if len(outputs) == 1 else merge(outputs)
