"""What produces tokens, as the front end sees it. In production the router over the replicas; in tests a script."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from cluster.frontend.stored_call import FoundCall, Holder
from cluster.replica.keep import Keep
from cluster.types import ReplicaInfo
from engine.request import Output, Request


class Backend(Protocol):
    def generate(
        self, request: Request, keep: Keep | None = None, holder: Holder | None = None
    ) -> AsyncGenerator[Output, None]:
        """The outputs of one sequence, the last one with a finish reason. Closing the generator aborts the sequence,
        unless ``keep`` says that its client may come back for it within a grace time. With ``holder`` it runs already,
        and is read from its beginning.

        Raises, at the first output or at any later one: errors of the tree (Overloaded, Unavailable, RankFailure, …).
        """
        ...

    async def find(self, call_id: str) -> FoundCall:
        """Who has a request that its client came back for. Raises UnknownStream."""
        ...

    def abandon(self, found: FoundCall) -> None:
        """Nobody wants the request any more, wherever it runs."""
        ...

    def replicas(self) -> Sequence[ReplicaInfo]:
        """What each replica last said of itself. Does not wait."""
        ...

    async def load_adapter(self, name: str, path: str) -> None:
        """On all replicas, or on none. Raises AdapterError; ``replicas`` shows it from now on."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """From all replicas; returns when the requests that use it have ended. Raises AdapterError."""
        ...

    def dump(self, replica: str) -> AsyncGenerator[bytes, None]:
        """A replica's flight record, in parts; empty: the only one's. Raises InvalidRequest where there is none of that
        name, and Unavailable, then or later."""
        ...

    async def drain(self, replica: str) -> None:
        """Give this replica no more work. Raises InvalidRequest where there is none of that name."""
        ...
