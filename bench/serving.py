"""Starts servers for benchmarks and waits until they answer."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
_LOG_BYTES = 4000


class ServerFailed(Exception):
    """A server ended or was not ready in time; the message holds the end of its log."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def remuda_command(model: str, port: int, *options: str) -> list[str]:
    """``remuda serve`` of this environment."""
    command = [str(Path(sys.executable).parent / "remuda"), "serve", model, "--port", str(port)]
    return [*command, "--grpc-port", str(free_port()), *options]


@asynccontextmanager
async def serving(
    command: Sequence[str], ready_url: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[int]:
    """The server's pid, once ``ready_url`` answers 200. Raises ServerFailed."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env={**os.environ, **(environment or {})}, start_new_session=True
        )
        try:
            try:
                await _until_ready(ready_url, process)
            except (TimeoutError, ServerFailed) as error:
                log.seek(max(log.seek(0, os.SEEK_END) - _LOG_BYTES, 0))
                raise ServerFailed(f"{command[0]}: {error}\n{log.read().decode(errors='replace')}") from error
            yield process.pid
        finally:
            await _stop(process)


async def _until_ready(url: str, process: Process) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S), aiohttp.ClientSession() as session:
        while process.returncode is None:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.2)
    raise ServerFailed(f"ended with status {process.returncode} before it was ready")


async def _stop(process: Process) -> None:
    """What does not end when asked to is killed with all that it started."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
