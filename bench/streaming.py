"""The streaming path without a model: 64 streams, each a token per step, from a mock engine to their readers.

Two loads. *Full speed*: the next step begins when the last one's tokens are on their way; the figures are tokens/s that
reach the readers in the whole run and while all streams run (from the last one's first message to the first one's last;
what waited for slow readers until then is in it), and the seconds before that, in which 64 requests that come at once
are admitted. *Paced* at 20 ms a step, as a large model would: the
figures are CPU per token of the server processes, plus the reader's where the reader is the front end's own client, and
how much later than their stream's quickest message 99 % of messages come. The reference, in turns with ours: a plain
grpc.aio server that sends one message per token, and does nothing else.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from bench.measure import Row, row
from bench.streaming_paths import MakePath, Received, front_end_grpc, front_end_http, leader_to_client, plain_grpc

NUM_STREAMS = 64
PACED_STEP_S = 0.020
PATHS: dict[str, tuple[MakePath, int]] = {
    # Path, and tokens per stream at full speed: about a second's worth, for the reference too.
    "leader → client": (leader_to_client, 3000),
    "leader → front end → gRPC": (front_end_grpc, 3000),
    "leader → front end → SSE": (front_end_http, 3000),
}
REFERENCE_TOKENS = 600
PACED_TOKENS = 100


@dataclass(frozen=True)
class Figures:
    """One repetition. CPU of the servers, and of the servers and this process together, in µs per token.
    ``all_tokens_per_s``: while all streams run. ``begin_ms``: until the last of them has its first message."""

    tokens_per_s: float
    all_tokens_per_s: float
    begin_ms: float
    server_cpu_us: float
    all_cpu_us: float
    tokens_per_message: float
    delay_p99_ms: float


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def measure(make_path: MakePath, num_tokens: int, step_s: float) -> Figures:
    async with make_path(step_s) as path:
        await asyncio.gather(*(path.read(index, 20) for index in range(NUM_STREAMS)))
        server_s, own_s = sum(map(_cpu_s, path.pids)), _cpu_s(os.getpid())
        began_s = time.perf_counter()
        received = await asyncio.gather(*(path.read(index, num_tokens) for index in range(NUM_STREAMS)))
        elapsed_s = time.perf_counter() - began_s
        server_s, own_s = sum(map(_cpu_s, path.pids)) - server_s, _cpu_s(os.getpid()) - own_s
    total = NUM_STREAMS * num_tokens
    all_begun_s = max(each.times_s[0] for each in received)
    num_messages = sum(len(each.times_s) for each in received)
    delays_s = sorted(delay_s for each in received for delay_s in each.delays_s(step_s))
    return Figures(
        tokens_per_s=total / elapsed_s,
        all_tokens_per_s=_rate_of_all(received, num_tokens, all_begun_s) or total / elapsed_s,
        begin_ms=(all_begun_s - began_s) * 1e3,
        server_cpu_us=server_s / total * 1e6,
        all_cpu_us=(server_s + own_s) / total * 1e6,
        tokens_per_message=total / num_messages,
        delay_p99_ms=delays_s[len(delays_s) * 99 // 100] * 1e3,
    )


def _rate_of_all(received: Sequence[Received], num_tokens: int, all_begun_s: float) -> float:
    """Tokens/s of all streams while each of them runs; 0 where they were too short to run at once. A path that counts
    messages has as many tokens in each, on average."""
    one_ended_s = min(each.times_s[-1] for each in received)
    if one_ended_s <= all_begun_s:
        return 0.0
    shares = [(each.num_at(one_ended_s) - each.num_at(all_begun_s)) / each.total for each in received]
    return sum(shares) * num_tokens / (one_ended_s - all_begun_s)


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    share = 10 if quick else 1
    full: dict[str, list[Figures]] = {name: [] for name in PATHS}
    paced: dict[str, list[Figures]] = {name: [] for name in PATHS}
    full_reference: list[Figures] = []
    paced_reference: list[Figures] = []
    for _ in range(num_repetitions):
        full_reference.append(asyncio.run(measure(plain_grpc, REFERENCE_TOKENS // share, 0.0)))
        paced_reference.append(asyncio.run(measure(plain_grpc, PACED_TOKENS // share, PACED_STEP_S)))
        for name, (make_path, num_tokens) in PATHS.items():
            full[name].append(asyncio.run(measure(make_path, num_tokens // share, 0.0)))
            paced[name].append(asyncio.run(measure(make_path, PACED_TOKENS // share, PACED_STEP_S)))
    return [
        *(_speed_row(name, full[name], full_reference) for name in PATHS),
        *(_all_row(name, full[name], full_reference) for name in PATHS),
        *(_begin_row(name, full[name], full_reference) for name in PATHS),
        *(_cpu_row(name, paced[name], paced_reference) for name in PATHS),
        *(_delay_row(name, paced[name], paced_reference) for name in PATHS),
    ]


def _speed_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    merged = statistics.median(figures.tokens_per_message for figures in ours)
    return row(
        f"streaming, {NUM_STREAMS} streams, full speed",
        f"{name} ({merged:.1f} tokens a message)",
        "tokens/s",
        [figures.tokens_per_s for figures in ours],
        [figures.tokens_per_s for figures in reference],
        "higher",
        "÷ grpc.aio, one token a message; the whole run",
    )


def _all_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    return row(
        f"streaming, {NUM_STREAMS} streams, full speed, while all run",
        name,
        "tokens/s",
        [figures.all_tokens_per_s for figures in ours],
        [figures.all_tokens_per_s for figures in reference],
        "higher",
        "÷ grpc.aio, one token a message",
    )


def _begin_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    return row(
        f"streaming, {NUM_STREAMS} requests at once",
        name,
        "ms, all begun",
        [figures.begin_ms for figures in ours],
        [figures.begin_ms for figures in reference],
        "lower",
        "÷ grpc.aio, one token a message; until the last stream's first message, at full speed",
    )


def _delay_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    return row(
        f"streaming, {NUM_STREAMS} streams, a step every {PACED_STEP_S * 1000:g} ms",
        name,
        "ms added, p99",
        [figures.delay_p99_ms for figures in ours],
        [figures.delay_p99_ms for figures in reference],
        "lower",
        "÷ grpc.aio, one token a message; later than the stream's quickest message",
    )


def _cpu_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    reader_is_ours = PATHS[name][0] is leader_to_client
    parts = "server and client" if reader_is_ours else "servers only"
    return row(
        f"streaming, {NUM_STREAMS} streams, a step every {PACED_STEP_S * 1000:g} ms",
        name,
        "CPU µs/token",
        [figures.all_cpu_us if reader_is_ours else figures.server_cpu_us for figures in ours],
        [figures.all_cpu_us if reader_is_ours else figures.server_cpu_us for figures in reference],
        "lower",
        f"÷ grpc.aio, one token a message; {parts}",
    )
