"""Where the buckets and the counts of running requests are kept."""

from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["requests", "tokens"]

LEASE_S = 60.0
"""A running request that is not renewed for so long belonged to a front end that is gone."""


@dataclass(frozen=True)
class Level:
    """Of one bucket. ``wait_s``: 0 where what was asked for was taken, else after how long it would be there."""

    wait_s: float
    remaining: int
    reset_s: float


class LimitStore(Protocol):
    """Raises StoreUnavailable from any of them."""

    async def take(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> Level:
        """From a bucket; all or nothing. With amount 0 it tells the level."""
        ...

    async def give(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> None:
        """Back to it; a negative amount is taken, whether it is there or not."""
        ...

    async def enter(self, tenant: str, request_id: str, max_running: int) -> bool:
        """Whether one more request may run; then it counts until ``leave``, or until it is not renewed."""
        ...

    async def leave(self, tenant: str, request_id: str) -> None: ...

    async def renew(self, tenant: str, request_ids: list[str]) -> None:
        """They still run, wherever they entered."""
        ...


class StoreUnavailable(Exception):
    """The store cannot be asked now."""
