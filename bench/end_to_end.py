"""Tokens/s of remuda-tiny through the whole of ``remuda serve``: HTTP streams in a closed loop, prompts of 128 tokens,
64 tokens out, at concurrency 1 and 8. The reference, in turns: transformers' generate on the same checkpoint in its
dtype, a static batch of as many prompts, one thread, as our one rank has.
"""

import asyncio
import os
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

import engine
from bench.load_cases import parse_case
from bench.loadgen import LoadGenerator
from bench.measure import Row, row

MODEL = "remuda-tiny"
MODEL_PATH = Path(engine.__path__[0]) / "assets" / "remuda-tiny"
CONCURRENCY = (1, 8)
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
ORDINARY_TOKENS = list(range(300, 1300))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, int]]:
    """``remuda serve`` with one rank: its URL and pid."""
    port, grpc_port = _free_port(), _free_port()
    command = [str(Path(sys.executable).parent / "remuda"), "serve", MODEL, "--port", str(port)]
    command += ["--grpc-port", str(grpc_port), "--tp", "1"]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            await _until_ready(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}", process.pid
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)


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
    raise RuntimeError(f"remuda serve ended with status {process.returncode}")


@asynccontextmanager
async def reference(num_prompt_tokens: int, num_output_tokens: int) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "bench.generate_reference", str(MODEL_PATH)]
    command += ["--num-prompt-tokens", str(num_prompt_tokens), "--num-output-tokens", str(num_output_tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    drain = asyncio.create_task(process.stderr.read())
    try:
        if not await process.stdout.readline():
            raise RuntimeError(f"the reference did not start:\n{(await drain).decode()[-4000:]}")
        yield process
    finally:
        process.stdin.close()
        await process.wait()
        await drain


async def _reference_rate(process: Process, num_sequences: int) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{num_sequences}\n".encode())
    return float(await process.stdout.readline())


async def measure(num_repetitions: int) -> list[Row]:
    cases = {count: parse_case(f"c{count}") for count in CONCURRENCY}
    one = cases[1]
    ours: dict[int, list[float]] = {count: [] for count in CONCURRENCY}
    theirs: dict[int, list[float]] = {count: [] for count in CONCURRENCY}
    async with reference(one.num_own_tokens, one.num_output_tokens) as process, serving() as (url, pid):
        generator = LoadGenerator(url, MODEL, ORDINARY_TOKENS, seed=0, server_pids=(pid,))
        for count, case in cases.items():  # warm-up
            await generator.run(case)
            await _reference_rate(process, count)
        for _ in range(num_repetitions):
            for count, case in cases.items():
                theirs[count].append(await _reference_rate(process, count))
                ours[count].append((await generator.run(case)).out_tok_s)
    return [
        row(
            "end to end, remuda-tiny over HTTP",
            f"concurrency {count}",
            "tokens/s",
            ours[count],
            theirs[count],
            "higher",
            f"÷ transformers generate, one static batch; {one.num_own_tokens} tokens in, {one.num_output_tokens} out",
        )
        for count in CONCURRENCY
    ]


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(1 if quick else num_repetitions))
