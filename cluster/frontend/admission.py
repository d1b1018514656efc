"""How much work the front end lets in."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Draining
from cluster.identity.principal import DEFAULT_TENANT
from engine.errors import InvalidRequest, Overloaded

OTHERS_PART = 16


class Admission:
    """Counts live requests and their sequences (choices).

    Args:
        max_live_sequences: beyond it a request is refused; the client may come back.
    """

    def __init__(self, max_live_sequences: int) -> None:
        self._max_live_sequences = max_live_sequences
        self._num_sequences = 0
        self._by_tenant: Counter[str] = Counter()
        self._num_requests = 0
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_requests(self) -> int:
        return self._num_requests

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """No new requests from now on."""
        self._is_closed = True

    async def wait_idle(self) -> None:
        """Until no request is live."""
        await self._idle.wait()

    @contextmanager
    def admitted(self, num_sequences: int, tenant: str = DEFAULT_TENANT) -> Iterator[None]:
        """One request's stay. A sixteenth of the room is left to others by each tenant that has a name.

        Raises:
            Draining: no new requests are taken.
            Overloaded: there is no room now.
            InvalidRequest: it would not fit into an idle server.
        """
        if self._is_closed:
            raise Draining("the server is draining and takes no new requests; send this one to another")
        if num_sequences > self._max_live_sequences:
            raise InvalidRequest(
                f"prompts × n is {num_sequences}; this server runs at most {self._max_live_sequences} at once", "n"
            )
        if self._num_sequences + num_sequences > self._max_live_sequences:
            raise Overloaded(
                f"{self._num_sequences} sequences are live and at most {self._max_live_sequences} may be; try later"
            )
        room = self._max_live_sequences - (0 if tenant == DEFAULT_TENANT else self._max_live_sequences // OTHERS_PART)
        if self._by_tenant[tenant] + num_sequences > room and self._num_sequences:
            raise Overloaded(
                f"tenant {tenant!r} may have {room} live sequences, which leaves room to others; try later"
            )
        self._num_sequences += num_sequences
        self._by_tenant[tenant] += num_sequences
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_sequences -= num_sequences
            self._by_tenant[tenant] -= num_sequences
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]
            self._num_requests -= 1
            if not self._num_requests:
                self._idle.set()
