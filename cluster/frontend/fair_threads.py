"""Threads for clients' work, which takes turns by tenant: one tenant's many long prompts are not in another's way."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from cluster.identity.principal import current_principal

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    result: asyncio.Future[Any]
    has_begun: bool = False


class FairThreads:
    """So many threads, and a queue for each tenant in front of them. A free thread takes the first job of the tenant
    whose turn it is; tenants' turns come one after another.

    For the event loop's thread alone. How many may wait is the business of whoever admits requests.

    Args:
        num_threads: jobs that run at once.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_free = num_threads
        self._waiting: dict[str, deque[_Job]] = {}
        """By tenant, the next one first; none is empty."""

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the function gives, for the tenant that the running task acts for. Raises what it raises.

        A job whose client leaves is dropped, or, once it has begun, keeps its thread until it ends.
        """
        tenant = current_principal().tenant
        job = _Job(partial(function, *args, **kwargs), asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(job)
        self._begin()
        try:
            return cast(_T, await job.result)
        finally:
            if not job.has_begun:
                self._drop(tenant, job)

    def close(self) -> None:
        """Ends the threads; what they are at is finished first, what waits is cancelled."""
        waiting, self._waiting = self._waiting, {}
        for jobs in waiting.values():
            for job in jobs:
                job.result.cancel()
        self._pool.shutdown()

    def _begin(self) -> None:
        while self._num_free and self._waiting:
            tenant = next(iter(self._waiting))
            jobs = self._waiting.pop(tenant)
            job = jobs.popleft()
            if jobs:
                self._waiting[tenant] = jobs  # behind all others
            job.has_begun = True
            self._num_free -= 1
            running = asyncio.get_running_loop().run_in_executor(self._pool, job.work)
            running.add_done_callback(partial(self._ended, job))

    def _ended(self, job: _Job, done: asyncio.Future[Any]) -> None:
        self._num_free += 1
        error = done.exception()
        # Its client may have left.
        if not job.result.done():
            if error is None:
                job.result.set_result(done.result())
            else:
                job.result.set_exception(error)
        self._begin()

    def _drop(self, tenant: str, job: _Job) -> None:
        jobs = self._waiting.get(tenant)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[tenant]
