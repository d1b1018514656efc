"""What surrounds the experts of a mixture, on ``num_threads`` threads, against reading memory: the router's choice, of
the bytes of its matrix; tokens sorted by expert, of the tokens' bytes; and their sums, of the experts' outputs'.
"""

import torch

from bench.measure import Row
from bench.roof_kernels import Roofs, against_read, open_roofs, rotating, tokens_case
from engine.kernels.native_library import tile_library
from engine.kernels.routing import Scoring, combine, dispatch, route

NUM_EXPERTS, NUM_CHOSEN, HIDDEN_SIZE = 128, 8, 2048
ROUTED_TOKENS = (1, 8, 32)
SORTED_TOKENS = (32, 256)


def run(num_repetitions: int, quick: bool, num_threads: int) -> list[Row]:
    if tile_library() is None:
        return []  # this CPU has no tile units: there is no kernel to measure
    with open_roofs(quick, num_threads) as roofs:
        return [
            *[_routed(roofs, num_tokens, num_repetitions) for num_tokens in ROUTED_TOKENS],
            *[_sorted(roofs, num_tokens, num_repetitions) for num_tokens in SORTED_TOKENS],
            *[_summed(roofs, num_tokens, num_repetitions) for num_tokens in SORTED_TOKENS],
        ]


def _routed(roofs: Roofs, num_tokens: int, num_repetitions: int) -> Row:
    stacks = rotating(roofs, (NUM_EXPERTS, HIDDEN_SIZE), torch.bfloat16)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, dtype=torch.bfloat16)

    def work(thread: int) -> None:
        for weight in stacks[thread]:
            route(hidden, weight, NUM_CHOSEN, Scoring.NORMALIZED_SOFTMAX)

    name = f"router's choice, {NUM_CHOSEN} of {NUM_EXPERTS}"
    return against_read(roofs, name, tokens_case(num_tokens), work, _gigabytes(stacks), num_repetitions)


def _sorted(roofs: Roofs, num_tokens: int, num_repetitions: int) -> Row:
    stacks = rotating(roofs, (num_tokens, HIDDEN_SIZE), torch.bfloat16)
    expert_ids, scores = _choices(num_tokens)

    def work(thread: int) -> None:
        for hidden in stacks[thread]:
            dispatch(hidden, expert_ids, scores, range(NUM_EXPERTS), scales_inputs=False)

    name = f"tokens sorted by expert, {NUM_CHOSEN} of {NUM_EXPERTS}"
    return against_read(roofs, name, tokens_case(num_tokens), work, _gigabytes(stacks), num_repetitions)


def _summed(roofs: Roofs, num_tokens: int, num_repetitions: int) -> Row:
    stacks = rotating(roofs, (num_tokens * NUM_CHOSEN, HIDDEN_SIZE), torch.bfloat16)
    sorted_tokens = dispatch(stacks[0][0][:num_tokens], *_choices(num_tokens), range(NUM_EXPERTS), scales_inputs=False)
    assert sorted_tokens is not None
    _, _, token_rows, scores = sorted_tokens

    def work(thread: int) -> None:
        for outputs in stacks[thread]:
            combine(outputs, token_rows, num_tokens, scores)

    name = f"sums of experts' outputs, {NUM_CHOSEN} of {NUM_EXPERTS}"
    return against_read(roofs, name, tokens_case(num_tokens), work, _gigabytes(stacks), num_repetitions)


def _choices(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn by chance, the same in every run: ids [T, K] and scores [T, K]."""
    generator = torch.Generator().manual_seed(num_tokens)
    order = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)
    return order[:, :NUM_CHOSEN].contiguous(), torch.rand(num_tokens, NUM_CHOSEN, generator=generator)


def _gigabytes(stacks: list[torch.Tensor]) -> float:
    return sum(stack.nbytes for stack in stacks) / 1e9
