"""What a server holds: memory, open files, threads, and requests, as others see it."""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import httpx

_GAUGES = (
    "remuda_live_requests",
    "remuda_num_requests_running",
    "remuda_num_requests_waiting",
    "remuda_kv_cache_usage_perc",
)
_SETTLE_S = 45.0
"""A stored response that nobody reads is stopped after 30 s."""


@dataclass(frozen=True)
class Footprint:
    """Of one process. ``memory_bytes``: what nobody shares with it."""

    memory_bytes: int
    num_files: int
    num_threads: int


def footprints(pids: Iterable[int]) -> dict[int, Footprint]:
    """Of those that live."""
    found = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/smaps_rollup") as lines:
            private = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
            folders = (f"/proc/{pid}/fd", f"/proc/{pid}/task")
            found[pid] = Footprint(private, *(len(os.listdir(folder)) for folder in folders))
    return found


async def idle(client: httpx.AsyncClient) -> None:
    """Returns when /metrics says that there is no request and no block in use. Fails after 45 s."""
    async with asyncio.timeout(_SETTLE_S):
        while any((await gauges(client)).values()):  # noqa: ASYNC110  the server has no event for it
            await asyncio.sleep(0.1)


async def gauges(client: httpx.AsyncClient, headers: dict[str, str] | None = None) -> dict[str, float]:
    text = (await client.get("/metrics", headers=headers)).text
    found = {}
    for line in text.splitlines():
        if line.startswith(_GAUGES):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    assert len(found) == len(_GAUGES), found
    return found
