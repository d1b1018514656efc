"""What lies between products (norm, SwiGLU, rotation with the write to the cache), on ``num_threads`` threads, against
reading memory: of the bytes that a kernel reads, which come from memory. What it writes stays in the CPU's cache.
"""

from collections.abc import Callable

import torch

from bench.measure import Row
from bench.roof_kernels import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Roofs, against_read, open_roofs, rotating
from engine.kernels.elementwise import rms_norm, silu_multiply
from engine.kernels.rotate_and_write import rotate_and_write

NUM_TOKENS, HIDDEN_SIZE, WIDTH = 64, 2048, 8192
_EPS = 1e-5


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    heads = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    with open_roofs(quick, num_threads) as roofs:
        found = [
            _row(roofs, "norm", HIDDEN_SIZE, _norm, num_repetitions),
            _row(roofs, "SwiGLU", 2 * WIDTH, silu_multiply, num_repetitions),
            _row(roofs, "rotation and write to the cache", heads, _rotated, num_repetitions),
        ]
    return [row for row in found if row is not None]


def _row(
    roofs: Roofs, name: str, size: int, compute: Callable[[torch.Tensor], torch.Tensor | None], num_repetitions: int
) -> Row | None:
    """``compute`` takes [T, size], and gives None where there is no kernel."""
    stacks = rotating(roofs, (NUM_TOKENS, size), torch.bfloat16)
    if compute(stacks[0][0]) is None:
        return None

    def work(thread: int) -> None:
        for rows in stacks[thread]:
            compute(rows)

    gigabytes = sum(stack.nbytes for stack in stacks) / 1e9
    return against_read(roofs, name, f"{NUM_TOKENS} × {size}", work, gigabytes, num_repetitions)


_WEIGHT = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)


def _norm(hidden: torch.Tensor) -> torch.Tensor | None:
    return rms_norm(hidden, _WEIGHT, _EPS)


_ANGLES = tuple(torch.rand(NUM_TOKENS, 1, HEAD_DIM // 2) for _ in range(2))
_SLOTS = torch.arange(NUM_TOKENS)


def _rotated(heads: torch.Tensor) -> torch.Tensor | None:
    """Queries, keys and values of a row lie beside one another, as a product gives them."""
    query, key, value = heads.unflatten(1, (-1, HEAD_DIM)).split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    cache = torch.empty(2, NUM_TOKENS // BLOCK_SIZE, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    return rotate_and_write(query, key, value, cache[0], cache[1], _SLOTS, (_ANGLES[0], _ANGLES[1]))
