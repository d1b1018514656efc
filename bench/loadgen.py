"""One load generator for every server with a streaming OpenAI ``/v1/completions``.

    python -m bench.loadgen --url http://127.0.0.1:8000 --model NAME --ids good_ids.json --out result.json
        [--cases c1,c8,c32,long8,shared8] [--reps 3] [--pid SERVER_PID]

A closed loop: N clients, token ids in, greedy, ``ignore_eos``, a fixed number of tokens out. Output tok/s = generated
tokens / (last token - first send); TTFT = send to the first chunk with text; ITL = gaps between chunks, all requests
pooled; TPOT = (last - first) / (tokens - 1) of each request; tokens as the server's usage counts them. Repetitions
interleave the cases, so slow drift of the machine hits all alike; with ``--pid`` a repetition is clean when other
processes used under 0.15 core, and medians are taken over clean ones.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cpu_use import CpuMeter
from bench.load_cases import LoadCase, PromptMaker, parse_case
from cluster.bench.http_target import HttpTarget
from cluster.bench.load import closed_loop
from cluster.bench.target import LoadRequest
from cluster.bench.timing import Timing, percentile

CLEAN_OTHER_CORES = 0.15
WARM_UP = "c4"
CASE_LIMIT_S = 900.0
"""Of one case: the slowest peers need two minutes for the longest one."""


@dataclass(frozen=True)
class Repetition:
    """One case, once. Seconds; ``*_cores`` are CPU seconds a second."""

    num_requests: int
    out_tok_s: float
    in_tok_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_s: float
    itl_p95_s: float
    tpot_p50_s: float
    num_cached_tokens: int
    wall_s: float
    own_cores: float
    # None where the server's processes are not known, so that they cannot be told from others.
    other_cores: float | None
    # sharedN only: time to first token of the request that goes first and alone.
    first_ttft_s: float | None = None


class LoadFailed(Exception):
    """The server refused or broke a request, or took too long: a benchmark of it means nothing."""


class LoadGenerator:
    def __init__(
        self,
        url: str,
        model: str,
        token_ids: list[int],
        seed: int,
        server_pids: tuple[int, ...] = (),
        limit_s: float = CASE_LIMIT_S,
    ) -> None:
        """``token_ids``: what prompts are drawn from. ``server_pids``: roots of the server's process trees.
        ``limit_s``: that a case may take."""
        self._url = url
        self._model = model
        self._token_ids = token_ids
        self._generator = random.Random(seed)
        self._server_pids = server_pids
        self._limit_s = limit_s

    async def run(self, case: LoadCase, requests_per_client: float = 2) -> Repetition:
        """Run the case once, with at least four requests. Raises LoadFailed."""
        try:
            async with asyncio.timeout(self._limit_s):
                return await self._run(case, requests_per_client)
        except TimeoutError:
            raise LoadFailed(f"{case.name} was not over in {self._limit_s:g} s") from None

    async def _run(self, case: LoadCase, requests_per_client: float) -> Repetition:
        maker = PromptMaker(case, self._token_ids, self._generator)
        prompts = [maker.prompt() for _ in range(max(int(case.num_concurrent * requests_per_client), 4))]
        target = await HttpTarget.open(self._url, self._model, keep_alive=False)
        try:
            first = None
            if case.num_shared_tokens:
                (first,) = _good(await closed_loop(target, [LoadRequest(maker.prompt(), case.num_output_tokens)], 1))
            meter, started_s = CpuMeter(*self._server_pids), time.perf_counter()
            requests = [LoadRequest(prompt, case.num_output_tokens) for prompt in prompts]
            timings = _good(await closed_loop(target, requests, case.num_concurrent))
            own, other = meter.cores(time.perf_counter() - started_s)
        finally:
            await target.close()
        return _repetition(timings, own, other if self._server_pids else None, first)


def _good(timings: list[Timing]) -> list[Timing]:
    for timing in timings:
        if timing.error is not None:
            raise LoadFailed(timing.error)
        if not timing.is_counted:
            raise LoadFailed("the stream ended without usage")
    return timings


def _repetition(timings: list[Timing], own_cores: float, other_cores: float | None, first: Timing | None) -> Repetition:
    wall_s = max(t.chunks_s[-1] for t in timings) - min(t.sent_s for t in timings)
    ttft = [t.ttft_s for t in timings]
    itl = [gap for t in timings for gap in t.gaps_s]
    tpot = [t.token_s for t in timings if t.token_s is not None]
    return Repetition(
        num_requests=len(timings),
        out_tok_s=sum(t.num_output for t in timings) / wall_s,
        in_tok_s=sum(t.num_input for t in timings) / wall_s,
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p95_s=percentile(ttft, 0.95),
        itl_p50_s=percentile(itl, 0.5),
        itl_p95_s=percentile(itl, 0.95),
        tpot_p50_s=percentile(tpot, 0.5),
        num_cached_tokens=sum(t.num_cached for t in timings),
        wall_s=wall_s,
        own_cores=own_cores,
        other_cores=other_cores,
        first_ttft_s=first.ttft_s if first else None,
    )


def summary(repetitions: list[Repetition]) -> dict[str, object]:
    """Medians over the clean repetitions, or over the least disturbed one where none was clean; with the spread."""
    clean = [r for r in repetitions if (r.other_cores or 0) < CLEAN_OTHER_CORES]
    counted = clean or [min(repetitions, key=lambda r: r.other_cores or 0)]
    rows = [asdict(r) for r in counted]
    known = [key for key in rows[0] if rows[0][key] is not None]
    medians = {key: statistics.median(row[key] for row in rows) for key in known}
    rates = [r.out_tok_s for r in counted]
    return {
        "median": medians,
        "out_tok_s_spread": [min(rates), max(rates)],
        "num_repetitions": len(repetitions),
        "num_clean": len(clean),
        "repetitions": [asdict(r) for r in repetitions],
    }


async def measure(
    generator: LoadGenerator, cases: list[LoadCase], num_repetitions: int
) -> dict[str, dict[str, object]]:
    """Every case ``num_repetitions`` times, interleaved, after a warm-up. The summary of each by its name."""
    await generator.run(parse_case(WARM_UP), requests_per_client=1)
    taken: dict[str, list[Repetition]] = {case.name: [] for case in cases}
    for _ in range(num_repetitions):
        for case in cases:
            taken[case.name].append(await generator.run(case))
    return {name: summary(repetitions) for name, repetitions in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a server's streaming /v1/completions and time it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, type=Path, help="JSON list of the token ids that prompts are made of")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cases", default="c1,c8,c32,long8,shared8")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, action="append", default=[], help="root of the server's processes")
    arguments = parser.parse_args()
    try:
        cases = [parse_case(name) for name in arguments.cases.split(",")]
    except ValueError as error:
        parser.error(str(error))
    ids = json.loads(arguments.ids.read_text())
    generator = LoadGenerator(arguments.url, arguments.model, ids, arguments.seed, tuple(arguments.pid))
    result = asyncio.run(measure(generator, cases, arguments.reps))
    arguments.out.write_text(json.dumps({"url": arguments.url, "model": arguments.model, "cases": result}, indent=1))
    for name, case in result.items():
        median = case["median"]
        assert isinstance(median, dict)
        print(
            f"{name:10s} out {median['out_tok_s']:8.1f} tok/s  TTFT {median['ttft_p50_s'] * 1e3:.0f} ms  "
            f"ITL {median['itl_p50_s'] * 1e3:.1f} ms  clean {case['num_clean']}/{case['num_repetitions']}"
        )


if __name__ == "__main__":
    main()
