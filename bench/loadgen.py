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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

from bench.cpu_use import CpuMeter
from bench.load_cases import LoadCase, PromptMaker, parse_case

CLEAN_OTHER_CORES = 0.15
WARM_UP = "c4"


@dataclass
class Timing:
    """What one request's stream showed. Times are ``perf_counter`` seconds."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    num_cached: int = 0


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
    """The server refused or broke a request: a benchmark of it means nothing."""


def percentile(values: list[float], fraction: float) -> float:
    """Linear between the neighbours; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = (len(ordered) - 1) * fraction
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class LoadGenerator:
    def __init__(
        self, url: str, model: str, token_ids: list[int], seed: int, server_pids: tuple[int, ...] = ()
    ) -> None:
        """``token_ids``: what prompts are drawn from. ``server_pids``: roots of the server's process trees."""
        self._url = url.rstrip("/") + "/v1/completions"
        self._model = model
        self._token_ids = token_ids
        self._generator = random.Random(seed)
        self._server_pids = server_pids

    async def run(self, case: LoadCase, requests_per_client: float = 2) -> Repetition:
        """Run the case once, with at least four requests."""
        maker = PromptMaker(case, self._token_ids, self._generator)
        prompts = [maker.prompt() for _ in range(max(int(case.num_concurrent * requests_per_client), 4))]
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            first = None
            if case.num_shared_tokens:
                first = await self._request(session, maker.prompt(), case.num_output_tokens)
            meter, started_s = CpuMeter(*self._server_pids), time.perf_counter()
            timings: list[Timing] = []

            async def client() -> None:
                while prompts:
                    timings.append(await self._request(session, prompts.pop(), case.num_output_tokens))

            async with asyncio.TaskGroup() as clients:
                for _ in range(case.num_concurrent):
                    clients.create_task(client())
            own, other = meter.cores(time.perf_counter() - started_s)
        return _repetition(timings, own, other if self._server_pids else None, first)

    async def _request(self, session: aiohttp.ClientSession, prompt: list[int], num_output: int) -> Timing:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timing = Timing(time.perf_counter())
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                raise LoadFailed(f"{self._url}: {response.status} {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    _take_event(timing, json.loads(line[5:]))
        if not timing.chunks_s or not timing.num_output:
            raise LoadFailed(f"{self._url}: the stream ended without text or without usage")
        return timing


def _take_event(timing: Timing, event: dict[str, object]) -> None:
    now_s = time.perf_counter()
    if event.get("error"):
        raise LoadFailed(str(event["error"])[:300])
    usage = event.get("usage")
    if isinstance(usage, dict):
        timing.num_input, timing.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        timing.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = event.get("choices")
    if isinstance(choices, list) and choices and (choices[0].get("text") or choices[0].get("finish_reason") is None):
        timing.chunks_s.append(now_s)


def _repetition(timings: list[Timing], own_cores: float, other_cores: float | None, first: Timing | None) -> Repetition:
    wall_s = max(t.chunks_s[-1] for t in timings) - min(t.sent_s for t in timings)
    ttft = [t.chunks_s[0] - t.sent_s for t in timings]
    itl = [after - before for t in timings for before, after in zip(t.chunks_s, t.chunks_s[1:], strict=False)]
    tpot = [(t.chunks_s[-1] - t.chunks_s[0]) / (t.num_output - 1) for t in timings if t.num_output > 1]
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
        first_ttft_s=first.chunks_s[0] - first.sent_s if first else None,
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
