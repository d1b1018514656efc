"""Keeps a fleet in accord with a list of leaders that changes: who is new joins, who is gone leaves."""

import asyncio
from collections.abc import Callable, Mapping

from cluster.frontend.fleet import Fleet
from cluster.replica.client import ReplicaClient
from engine.errors import RemudaError

RETRY_INTERVAL_S = 1.0


class LeaderSet:
    """Belongs to the event loop.

    Args:
        new_client: from host:port to a client that is not connected yet.
        tell: what happened, for whoever started the front end.
    """

    def __init__(self, fleet: Fleet, new_client: Callable[[str], ReplicaClient], tell: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._new_client = new_client
        self._tell = tell
        self._wanted: dict[str, str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By leader: what is done about it, one thing after another."""

    def update(self, leaders: Mapping[str, str]) -> None:
        """``leaders``: name → host:port of all of them, from now on."""
        before, self._wanted = self._wanted, dict(leaders)
        for name in before.keys() | leaders.keys():
            if before.get(name) != leaders.get(name):
                self._tasks[name] = asyncio.create_task(self._change(name, self._tasks.get(name)))

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _change(self, name: str, former: "asyncio.Task[None] | None") -> None:
        if former is not None:
            former.cancel()
            await asyncio.gather(former, return_exceptions=True)
        address = self._wanted.get(name)
        if address is None:
            await self._fleet.remove(name)
            self._tell(f"{name} is gone")
            return
        await self._join(name, address)

    async def _join(self, name: str, address: str) -> None:
        """However long the leader takes to answer."""
        client, has_joined, last = self._new_client(address), False, ""
        try:
            while not has_joined:
                try:
                    await self._fleet.add(name, client)
                    has_joined = True
                except RemudaError as error:
                    if str(error) != last:
                        last = str(error)
                        self._tell(f"{name}: {error}; trying again")
                    await asyncio.sleep(RETRY_INTERVAL_S)
        finally:
            if not has_joined:
                await client.close()
        self._tell(f"{name} at {address} has joined")
