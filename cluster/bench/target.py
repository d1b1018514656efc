"""The seam between the load and the API that is loaded."""

from dataclasses import dataclass
from typing import Protocol

from cluster.bench.prompts import Prompt
from cluster.bench.timing import Timing


@dataclass(frozen=True)
class LoadRequest:
    """One request of the load. ``num_output``: tokens to generate."""

    prompt: Prompt
    num_output: int


class Target(Protocol):
    """A server's streaming API."""

    @property
    def model(self) -> str: ...

    async def run(self, request: LoadRequest, timing: Timing) -> None:
        """Send it and read the answer to its end, filling in ``timing`` from ``sent_s`` on.

        Raises Unavailable, Unauthenticated or ServingError with the server's own words.
        """
        ...

    async def close(self) -> None: ...
