"""What outsiders cannot see: no task of the front end and no block of the engine outlives its bad input."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from engine.errors import InvalidRequest
from tests.frontend.real_engine import RealBackend
from tests.frontend.servers import TINY, served
from tests.fuzz.bodies import MODEL
from tests.fuzz.campaign import Fuzzer, Report

NUM_INPUTS = 400
_SETTLE_S = 45.0


class Recorded(RealBackend):
    """With what operators may ask of a replica."""

    async def dump(self, replica: str) -> AsyncGenerator[bytes, None]:
        yield replica.encode()

    async def drain(self, replica: str) -> None:
        raise InvalidRequest(f"there is no replica {replica!r}", "replica")


async def test_tasks_and_blocks(seed: int) -> None:
    backend: Any = Recorded(TINY)
    try:
        async with served(backend, name=MODEL) as one:
            # As many, not the same: gRPC waits for each method's next call in a task of its own.
            num_before = len(asyncio.all_tasks())
            fuzzer = Fuzzer(seed, one.front_end.port, one.front_end.grpc_port)
            report = await fuzzer.run(Report(seed), lambda report: report.num_inputs >= NUM_INPUTS)
            assert not report.faults, report.told()
            async with asyncio.timeout(_SETTLE_S):
                while len(asyncio.all_tasks()) > num_before:  # noqa: ASYNC110  they end by themselves, one by one
                    await asyncio.sleep(0.05)
            assert not one.front_end.service._live
            stats = backend._engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
            backend._engine.check_integrity()
    finally:
        backend.close()
