"""Health endpoints alone, for processes that serve no clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.frontend.clock import LoopClock
from cluster.frontend.fleet import Fleet
from cluster.frontend.health import Health, Probed
from cluster.frontend.http import build_health_app
from cluster.frontend.http_protocol import HttpLimits
from cluster.frontend.listeners import HttpListener
from engine.errors import RemudaError

_OPTION = "--health-port"


@asynccontextmanager
async def serve_probes(host: str, port: int, probed: Probed) -> AsyncIterator[int]:
    """For the time of the context; gives the port. Raises InvalidOption where it is taken."""
    listener = HttpListener(build_health_app(probed), host, port, HttpLimits(), option=_OPTION)
    await listener.start()
    try:
        yield listener.port
    finally:
        await listener.stop()


class EngineFront:
    """Where ``remuda serve`` has its front end, ``remuda engine`` has this: probes that follow the replica's progress,
    and a drain that waits until other processes' front ends have nothing left there.

    Args:
        host: where to listen, with ``port``; 0 takes a free one.
        fleet: the one replica.
    """

    def __init__(self, host: str, port: int, fleet: Fleet) -> None:
        self._host = host
        self._fleet = fleet
        self._is_draining = False
        health = Health(fleet.replicas, lambda: self._is_draining, LoopClock(), stall_s=60.0)
        self._listener = HttpListener(build_health_app(health), host, port, HttpLimits(), option=_OPTION)

    @property
    def addresses(self) -> str:
        return f"probes http://{self._host}:{self._listener.port}"

    async def start(self) -> None:
        await self._listener.start()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those that run. False where some are left after ``timeout_s``."""
        self._is_draining = True
        for replica in self._fleet.replicas():
            await self._fleet.drain(replica.id, migrate_after_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_idle()
        except TimeoutError:
            return False
        return True

    async def stop(self, reason: RemudaError | None = None) -> None:
        await self._listener.stop()

    async def _wait_idle(self) -> None:
        while any(info.num_running + info.num_waiting for info in self._fleet.replicas()):
            await self._fleet.changed()
