"""Puts load on a target: closed loop (so many clients, each with one request after another) or open loop (requests at
given times, whether or not earlier ones have been answered)."""

import asyncio
import time
from collections.abc import Iterable

from cluster.bench.target import LoadRequest, Target
from cluster.bench.timing import Timing
from engine.errors import RemudaError

_SAMPLE_S = 0.005


class ClientMonitor:
    """How well the load generator itself keeps up. An async context manager around the load."""

    def __init__(self) -> None:
        self.loop_lags_s: list[float] = []
        """Every 5 ms: how much later than asked the event loop came back; a chunk may wait as long for its stamp."""
        self.cpu_share = 0.0
        """CPU seconds of this process a second."""

    async def __aenter__(self) -> "ClientMonitor":
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()
        self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sampler.cancel()
        self.cpu_share = (time.process_time() - self._began_cpu_s) / (time.perf_counter() - self._began_s)

    async def _sample(self) -> None:
        while True:
            asked_s = time.perf_counter()
            await asyncio.sleep(_SAMPLE_S)
            self.loop_lags_s.append(max(time.perf_counter() - asked_s - _SAMPLE_S, 0.0))


async def closed_loop(
    target: Target, requests: Iterable[LoadRequest], num_clients: int, duration_s: float | None = None
) -> list[Timing]:
    """Until there are no more ``requests`` or, where given, ``duration_s`` is over; what runs then is finished."""
    queue = iter(requests)
    until_s = None if duration_s is None else time.perf_counter() + duration_s
    timings: list[Timing] = []

    async def client() -> None:
        while (until_s is None or time.perf_counter() < until_s) and (request := next(queue, None)) is not None:
            timings.append(await timed(target, request))

    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return timings


async def open_loop(target: Target, requests: Iterable[LoadRequest], arrivals: Iterable[float]) -> list[Timing]:
    """Send each request at its time, in seconds from now."""
    began_s = time.perf_counter()
    tasks: list[asyncio.Task[Timing]] = []
    async with asyncio.TaskGroup() as group:
        for request, arrival_s in zip(requests, arrivals, strict=False):
            await asyncio.sleep(began_s + arrival_s - time.perf_counter())
            tasks.append(group.create_task(timed(target, request, began_s + arrival_s)))
    return [task.result() for task in tasks]


async def timed(target: Target, request: LoadRequest, planned_s: float | None = None) -> Timing:
    """The request's timing; one that failed says why in ``error``. ``planned_s``: when it should have been sent."""
    timing = Timing()
    try:
        await target.run(request, timing)
    except RemudaError as error:
        timing.error = str(error) or type(error).__name__
        timing.ended_s = time.perf_counter()
    if planned_s is not None:
        timing.lag_s = max(timing.sent_s - planned_s, 0.0)
    return timing
