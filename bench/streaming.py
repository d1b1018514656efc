"""The streaming path without a model: 64 streams, each a token per step, from a mock engine to their readers.

Three loads. *Full speed*: the next step begins when the last one's tokens are on their way; the figures are tokens/s
that reach the readers in the whole run and while all streams run (from the last one's first message to the first one's
last; what waited for slow readers until then is in it), and the seconds before that, in which 64 requests that come at
once are admitted. *Paced* at 20 ms a step, as a large model would: the figures are CPU per token of the server
processes, plus the reader's where the reader is the front end's own client, and how much later than their stream's
quickest token 99 % of tokens come. *Due*: steps are due at absolute times, so often that 64 streams have 7 times the
tokens/s that the reference reached in the same repetition; the figures are tokens/s that arrive and how late they are,
together. The reference, in turns with ours: a plain grpc.aio server that sends one message per token, and does nothing
else.
"""

import asyncio
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from bench.measure import Row, row
from bench.streaming_paths import MakePath, Received, front_end_grpc, front_end_http, leader_to_client, plain_grpc
from cluster.replica.heap import settle_heap

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
DUE_PATHS = ("leader → front end → gRPC", "leader → front end → SSE")
DUE_TOKENS = 5000
TIMES_REFERENCE = 7
"""Of the reference's tokens/s, with steps that are due at their times."""
DELAY_LIMIT_MS = 20.0
_DUE_TITLE = f"streaming, {NUM_STREAMS} streams, steps due at {TIMES_REFERENCE} × the rate of grpc.aio"


@dataclass(frozen=True)
class Figures:
    """One repetition. CPU of the servers, and of the servers and this process together, in µs per token.
    ``all_tokens_per_s``: while all streams run. ``begin_ms``: until the last of them has its first message.
    ``delay_p99_ms``: of all tokens; ``all_delay_p99_ms``: of those that come while all streams run."""

    tokens_per_s: float
    all_tokens_per_s: float
    begin_ms: float
    server_cpu_us: float
    all_cpu_us: float
    tokens_per_message: float
    delay_p99_ms: float
    all_delay_p99_ms: float


@dataclass
class Loads:
    """What each path gave, a figure of each repetition, and the reference beside it."""

    full: dict[str, list[Figures]] = field(default_factory=lambda: {name: [] for name in PATHS})
    paced: dict[str, list[Figures]] = field(default_factory=lambda: {name: [] for name in PATHS})
    due: dict[str, list[Figures]] = field(default_factory=lambda: {name: [] for name in DUE_PATHS})
    full_reference: list[Figures] = field(default_factory=list)
    paced_reference: list[Figures] = field(default_factory=list)

    def repeat(self, share: int) -> None:
        """Once more. ``share``: runs are that much shorter."""
        reference = _measured(plain_grpc, REFERENCE_TOKENS // share, 0.0)
        self.full_reference.append(reference)
        self.paced_reference.append(_measured(plain_grpc, PACED_TOKENS // share, PACED_STEP_S))
        for name, (make_path, num_tokens) in PATHS.items():
            self.full[name].append(_measured(make_path, num_tokens // share, 0.0))
            self.paced[name].append(_measured(make_path, PACED_TOKENS // share, PACED_STEP_S))
        step_s = NUM_STREAMS / (TIMES_REFERENCE * reference.all_tokens_per_s)
        for name in DUE_PATHS:
            self.due[name].append(_measured(PATHS[name][0], DUE_TOKENS // share, step_s))


def _measured(make_path: MakePath, num_tokens: int, step_s: float) -> Figures:
    settle_heap()  # of the readers, whose own pauses are not the path's
    return asyncio.run(measure(make_path, num_tokens, step_s))


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
    begun_s, ended_s = all_running(received)
    num_messages = sum(len(each.times_s) for each in received)
    return Figures(
        tokens_per_s=total / elapsed_s,
        all_tokens_per_s=_rate(received, num_tokens, begun_s, ended_s) or total / elapsed_s,
        begin_ms=(begun_s - began_s) * 1e3,
        server_cpu_us=server_s / total * 1e6,
        all_cpu_us=(server_s + own_s) / total * 1e6,
        tokens_per_message=total / num_messages,
        delay_p99_ms=delay_p99_ms(received, step_s),
        all_delay_p99_ms=delay_p99_ms(received, step_s, begun_s, ended_s),
    )


def all_running(received: Sequence[Received]) -> tuple[float, float]:
    """From the last stream's first message to the first stream's last; the second may be before the first where they
    were too short to run at once."""
    return max(each.times_s[0] for each in received), min(each.times_s[-1] for each in received)


def _rate(received: Sequence[Received], num_tokens: int, since_s: float, until_s: float) -> float:
    """Tokens/s of all streams between these times; 0 where there is none. A path that counts messages has as many
    tokens in each, on average."""
    if until_s <= since_s:
        return 0.0
    shares = [(each.num_at(until_s) - each.num_at(since_s)) / each.total for each in received]
    return sum(shares) * num_tokens / (until_s - since_s)


def delay_p99_ms(
    received: Sequence[Received], step_s: float, since_s: float = -math.inf, until_s: float = math.inf
) -> float:
    """Of all streams' tokens that came between these times; of all where none did."""
    delays_s = np.concatenate([each.delays_s(step_s, since_s, until_s) for each in received])
    if not len(delays_s):
        delays_s = np.concatenate([each.delays_s(step_s) for each in received])
    return float(np.quantile(delays_s, 0.99)) * 1e3


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    loads = Loads()
    for _ in range(num_repetitions):
        loads.repeat(10 if quick else 1)
    full, paced = loads.full_reference, loads.paced_reference
    return [
        *(_speed_row(name, found, full) for name, found in loads.full.items()),
        *(_all_row(name, found, full) for name, found in loads.full.items()),
        *(_begin_row(name, found, full) for name, found in loads.full.items()),
        *(_cpu_row(name, found, paced) for name, found in loads.paced.items()),
        *(_delay_row(name, found, paced) for name, found in loads.paced.items()),
        *(_due_row(name, found, full) for name, found in loads.due.items()),
        *(each for name, found in loads.due.items() for each in _late_rows(name, found)),
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
        "÷ grpc.aio, one token a message; later than the stream's quickest token",
    )


def _due_row(name: str, ours: list[Figures], reference: list[Figures]) -> Row:
    """The rate that was reached while all streams ran, with the delay at that rate beside it."""
    late_ms = statistics.median(figures.all_delay_p99_ms for figures in ours)
    merged = statistics.median(figures.tokens_per_message for figures in ours)
    return row(
        _DUE_TITLE,
        f"{name} (p99 {late_ms:.1f} ms late, {merged:.1f} tokens a message)",
        "tokens/s",
        [figures.all_tokens_per_s for figures in ours],
        [figures.all_tokens_per_s for figures in reference],
        "higher",
        "÷ grpc.aio at full speed, one token a message; reached while all run",
    )


def _late_rows(name: str, ours: list[Figures]) -> list[Row]:
    limits = [DELAY_LIMIT_MS] * len(ours)
    by_case = {
        "while all run": [figures.all_delay_p99_ms for figures in ours],
        "with the beginning": [figures.delay_p99_ms for figures in ours],
    }
    notes = f"÷ the limit of {DELAY_LIMIT_MS:g} ms; later than the stream's quickest token"
    return [
        row(_DUE_TITLE, f"{name}, {case}", "ms added, p99", found, limits, "lower", notes)
        for case, found in by_case.items()
    ]


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
