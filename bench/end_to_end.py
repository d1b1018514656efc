"""Tokens/s of remuda-tiny through the whole of ``remuda serve``: HTTP streams in a closed loop, prompts of 128 tokens,
64 tokens out, at concurrency 1 and 8. The reference, in turns: transformers' generate on the same checkpoint in its
dtype, a static batch of as many prompts, one thread, as our one rank has.
"""

import asyncio
from pathlib import Path

import engine
from bench.generate_process import generating
from bench.load_cases import parse_case
from bench.loadgen import LoadGenerator
from bench.measure import Row, row
from bench.serving import free_port, remuda_command, serving

MODEL = "remuda-tiny"
MODEL_PATH = Path(engine.__path__[0]) / "assets" / "remuda-tiny"
CONCURRENCY = (1, 8)
ORDINARY_TOKENS = list(range(300, 1300))


async def measure(num_repetitions: int) -> list[Row]:
    cases = {count: parse_case(f"c{count}") for count in CONCURRENCY}
    one = cases[1]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = remuda_command(MODEL, port, "--tp", "1")
    ours: dict[int, list[float]] = {count: [] for count in CONCURRENCY}
    theirs: dict[int, list[float]] = {count: [] for count in CONCURRENCY}
    async with generating(str(MODEL_PATH), num_threads=1) as process, serving(command, f"{url}/readyz") as pid:
        generator = LoadGenerator(url, MODEL, ORDINARY_TOKENS, seed=0, server_pids=(pid,))
        for case in cases.values():  # warm-up
            await generator.run(case)
            await process.rate(case)
        for _ in range(num_repetitions):
            for count, case in cases.items():
                theirs[count].append(await process.rate(case))
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
