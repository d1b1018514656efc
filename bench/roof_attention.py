"""Attention of prompts on ``num_threads`` threads, each with a cache of its own, against a bfloat16 GEMM."""

import torch

from bench.measure import Row
from bench.roof_kernels import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Roofs, against_gemm, open_roofs
from engine.kernels.decode_attention import can_attend
from engine.kernels.prompt_attention import Prompts, prompt_attention

CASES = ((512, 0), (2048, 0), (256, 2048))
"""Tokens that are computed, and positions before them that the cache has."""
_FLOPS_PER_THREAD = 2e10


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    with open_roofs(quick, num_threads) as roofs:
        found = [_prompt(roofs, num_tokens, start, num_repetitions, quick) for num_tokens, start in CASES]
    return [row for row in found if row is not None]


def _prompt(roofs: Roofs, num_tokens: int, start: int, num_repetitions: int, quick: bool) -> Row | None:
    num_blocks = (start + num_tokens) // BLOCK_SIZE
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    shape = (roofs.num_threads, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    caches = torch.randn(shape, dtype=torch.bfloat16)
    if not can_attend(query, caches[0, 0], only_prompts=True):
        return None  # this CPU has no tile units: there is no kernel to measure
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    first = torch.zeros(1, dtype=torch.int64)
    prompts = Prompts(first, first, torch.tensor([start]), torch.tensor([num_tokens]))
    # A token sees what was before the prompt, and the prompt up to itself.
    num_pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    num_flops = 4 * NUM_HEADS * HEAD_DIM * num_pairs
    num_calls = 1 if quick else max(round(_FLOPS_PER_THREAD / num_flops), 1)

    def work(thread: int) -> None:
        output = torch.empty_like(query)
        keys, values = caches[thread]
        for _ in range(num_calls):
            prompt_attention(query, output, keys, values, table, prompts, chunk_size=None, window_size=None)

    teraflops = num_calls * num_flops * roofs.num_threads / 1e12
    case = f"{num_tokens} tokens" + f" behind {start}" * bool(start)
    return against_gemm(roofs, "prompt attention", case, work, teraflops, num_repetitions)
