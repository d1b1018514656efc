"""transformers' generate as a process of its own (bench/generate_reference.py): it shares no thread pool with us."""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.load_cases import LoadCase


class GenerateProcess:
    """``dtype``: that it computes in, as "bfloat16"."""

    def __init__(self, process: Process, dtype: str) -> None:
        self._process = process
        self.dtype = dtype

    async def seconds(self, case: LoadCase, num_output_tokens: int) -> float:
        """For one static batch of the case's prompts, and so many tokens for each. Raises RuntimeError where the
        process has ended."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        num_prompt_tokens = case.num_shared_tokens + case.num_own_tokens
        process.stdin.write(f"{case.num_concurrent} {num_prompt_tokens} {num_output_tokens}\n".encode())
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reference ended in {case.name} with status {await process.wait()}")
        return float(line)

    async def rate(self, case: LoadCase) -> float:
        """Output tokens a second."""
        return case.num_concurrent * case.num_output_tokens / await self.seconds(case, case.num_output_tokens)


@asynccontextmanager
async def generating(model: str, num_threads: int) -> AsyncIterator[GenerateProcess]:
    command = [sys.executable, "-m", "bench.generate_reference", model, "--num-threads", str(num_threads)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    process = await create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    drain = asyncio.create_task(process.stderr.read())
    try:
        dtype = (await process.stdout.readline()).decode().strip()
        if not dtype:
            raise RuntimeError(f"the reference did not start:\n{(await drain).decode()[-4000:]}")
        yield GenerateProcess(process, dtype.removeprefix("torch."))
    except BaseException:
        # It may be in the midst of a batch, and would finish it.
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    finally:
        process.stdin.close()
        await process.wait()
        await drain
