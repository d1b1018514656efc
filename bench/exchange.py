"""Tokens to their experts and back among four ranks (``python -m bench.exchange``): bytes that a rank sends to others,
and microseconds from dispatch to combined sums, the experts themselves left out. bfloat16, random routing.

Options: ``--gloo``: as between hosts, over loopback, in place of shared memory.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from bench.rank_processes import on_ranks
from engine.config import ParallelConfig
from engine.parallel.all_to_all_dispatch import AllToAllDispatch
from engine.parallel.collectives import Collectives, LocalCollectives, ReceivedRows
from engine.parallel.distributed import init_distributed
from engine.parallel.expert_balance import linear_placement
from engine.parallel.expert_table import ExpertTable

NUM_RANKS = 4
HIDDEN = 2048
# Experts, and how many each token chooses: as Mixtral, Qwen3-MoE, Llama 4 Maverick have them.
MIXTURES = {"8, top 2": (8, 2), "128, top 8": (128, 8), "128, top 1": (128, 1)}
NUM_TOKENS = (8, 256)
"""Of each rank in a step."""
NUM_CALLS = 60
Figures = dict[tuple[str, int], tuple[int, float]]


class CountedCollectives(LocalCollectives):
    """Passes all-to-alls on, and counts what they send to other ranks."""

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self.size, self.rank = group.size, group.rank
        self.num_bytes = 0

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        others = int(counts.sum() - counts[self.rank])
        self.num_bytes += others * rows.shape[1] * rows.element_size()
        return self._group.post_rows(rows, counts, expected)


def measure_rank(rank: int, store: dist.Store, over_gloo: bool) -> Figures:
    address = f"127.0.0.{rank + 1}" if over_gloo else "127.0.0.1"
    parallel = ParallelConfig(dp=NUM_RANKS, ep=NUM_RANKS)
    mesh = init_distributed(parallel, rank, store, torch.device("cpu"), 60.0, address)
    counted = CountedCollectives(mesh.stage)
    mesh = replace(mesh, stage=counted)
    generator = torch.Generator().manual_seed(rank)
    figures = {}
    for name, (num_experts, num_chosen) in MIXTURES.items():
        placement = linear_placement(num_experts, NUM_RANKS, num_experts // NUM_RANKS)
        dispatch = AllToAllDispatch(mesh, ExpertTable(num_experts, placement), scales_inputs=False)
        for num_tokens in NUM_TOKENS:
            hidden = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
            chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(num_chosen, dim=-1)
            counted.num_bytes, seconds = 0, []
            for _ in range(NUM_CALLS):
                begun_s = time.perf_counter()
                dispatched = dispatch.dispatch(hidden, chosen.indices, chosen.values)
                dispatched.combine(dispatched.receive().tokens)
                seconds.append(time.perf_counter() - begun_s)
            figures[name, num_tokens] = counted.num_bytes // NUM_CALLS, statistics.median(seconds) * 1e6
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gloo", action="store_true")
    over_gloo = parser.parse_args().gloo
    figures = on_ranks(NUM_RANKS, 100.0, measure_rank, over_gloo)
    print("| experts | tokens of a rank | bytes sent by rank 0 | µs (median of rank 0) |\n|---|---|---|---|")
    for (name, num_tokens), (num_bytes, us) in figures[0].items():
        print(f"| {name} | {num_tokens} | {num_bytes:,} | {us:,.0f} |")


if __name__ == "__main__":
    main()
