"""A pipeline over two hosts whose leader pulls the link out and puts a longer one in, and measures. For processes
of tests.support.rank_pool; imported by each of them."""

import time
from typing import Any

from engine.request import Request, SamplingParams
from tests.support.gang_engine import GangEngine
from tests.support.hosted_gang import leading, serve_as_rank, small_plan
from tests.support.hosts.bed import Bed
from tests.support.hosts.host import Host
from tests.support.hosts.network import Network
from tests.support.rank_pool import RankContext, run_ranks

NUM_REQUESTS = 8
PROMPT_TOKENS = 32
MAX_TOKENS = 40
_FIRST = 8
"""Tokens of each request that are not counted: prompts are still computed."""

Figures = dict[float, list[float]]
"""Tokens a second of each repetition, by the delay in milliseconds."""


def run_gang(bed: Bed, model: str, depth: int, delays_ms: tuple[float, ...], num_repetitions: int) -> Figures:
    """Two stages, one on each of the bed's first two hosts, and ``depth`` micro-batches in flight."""
    first, second = bed.hosts[:2]
    remote = (second.name, second.number)
    networks = [first.network, second.network, first.network]
    addresses = [first.address, second.address]
    arguments = (model, depth, addresses, bed.network.switch, remote, delays_ms, num_repetitions)
    figures: Figures = run_ranks(_process, 3, *arguments, networks=networks, timeout_s=100.0)[-1]
    return figures


def _process(context: RankContext, model: str, depth: int, addresses: list[str], *link: Any) -> Figures | None:
    if context.rank < 2:
        serve_as_rank(context)
        return None
    plan = small_plan(
        model,
        pipeline_parallel_size=2,
        dtype="bfloat16",
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=64 * 2**20,
        depth=depth,
    )
    with leading(context, plan, addresses[0], addresses, 16) as served:
        return _measure(served, *link)


def _measure(
    served: GangEngine, switch: str, remote: tuple[str, int], delays_ms: tuple[float, ...], num_repetitions: int
) -> Figures:
    network, host = Network(switch), Host(*remote)
    figures: Figures = {delay: [] for delay in delays_ms}
    try:
        for repetition in range(num_repetitions):
            for delay in delays_ms:
                network.delay(host, delay)
                figures[delay].append(_tokens_per_s(served, f"{repetition}-{delay:g}"))
    finally:
        network.delay(host, 0)
    return figures


def _tokens_per_s(served: GangEngine, name: str) -> float:
    """While all requests decode."""
    counts: dict[str, int] = {}
    for i in range(NUM_REQUESTS):
        prompt = [(7 * i + 3 * position + len(counts)) % 1000 for position in range(PROMPT_TOKENS)]
        counts[f"{name}-{i}"] = 0
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        served.engine.add(Request(f"{name}-{i}", prompt, len(prompt), sampling))
    began_s = ended_s = 0.0
    num_before = num_tokens = 0
    while served.engine.has_work:
        for output in served.engine.step():
            counts[output.request_id] += len(output.token_ids)
        if not began_s and min(counts.values()) >= _FIRST:
            began_s, num_before = time.perf_counter(), sum(counts.values())
        if began_s and max(counts.values()) < MAX_TOKENS:
            ended_s, num_tokens = time.perf_counter(), sum(counts.values()) - num_before
    return num_tokens / (ended_s - began_s)
