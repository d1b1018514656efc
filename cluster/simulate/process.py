"""A process of the simulation: tasks and connections that end together, at any moment."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from cluster.simulate.network import Broken, End, Network


class Process:
    """Args:
    name: for messages.
    host: where it runs.
    network: through which it speaks.
    """

    def __init__(self, name: str, host: str, network: Network) -> None:
        self.name = name
        self.host = host
        self.is_dead = False
        self._network = network
        self._tasks: dict[asyncio.Task[Any], None] = {}
        """In the order in which they began, so that a run can be repeated."""
        self._ends: list[End] = []
        self._addresses: list[str] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """An error that nobody awaits is noted by the loop, as a defect."""
        task = asyncio.get_running_loop().create_task(work)
        if self.is_dead:
            task.cancel()
        self._tasks[task] = None
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))
        return task

    def listen(self, address: str, serve: Any) -> None:
        """``serve(end)`` is a coroutine function, run for each connection."""
        self._addresses.append(address)

        def accept(end: End) -> None:
            self._ends.append(end)
            self.spawn(serve(end))

        self._network.listen(address, accept)

    async def connect(self, address: str) -> End:
        """Raises Broken."""
        if self.is_dead:
            raise Broken(f"{self.name} is dead")
        end = await self._network.connect(self.host, address)
        self._ends.append(end)
        return end

    def kill(self) -> None:
        """kill -9: nothing of it runs any more, its connections are reset."""
        if self.is_dead:
            return
        self.is_dead = True
        for address in self._addresses:
            self._network.close(address)
        for end in self._ends:
            end._connection.break_off(f"{self.name} died")
        for task in self._tasks:
            task.cancel()
