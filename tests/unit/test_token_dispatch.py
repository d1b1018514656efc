"""Tokens reach the experts that they were routed to, once each, over any division of the experts."""

import pytest
import torch

from engine.parallel.token_dispatch import ReplicatedDispatch

NUM_EXPERTS, NUM_TOKENS, HIDDEN = 8, 23, 5


def expert(index: int, tokens: torch.Tensor) -> torch.Tensor:
    return tokens * (index + 1) + index


@pytest.mark.parametrize("num_chosen", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("scales_inputs", [True, False])
def test_sum_over_ranks_is_the_mixture(scales_inputs: bool, num_ranks: int, num_chosen: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    scores, expert_ids = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(num_chosen, dim=-1)
    per_rank = NUM_EXPERTS // num_ranks
    total = torch.zeros_like(hidden)
    for rank in range(num_ranks):
        dispatch = ReplicatedDispatch(rank * per_rank, per_rank, scales_inputs=scales_inputs)
        dispatched = dispatch.dispatch(hidden[dispatch.share(NUM_TOKENS)], expert_ids, scores)
        tokens, counts = dispatched.receive().tokens, dispatched.receive().counts
        assert len(counts) == per_rank and int(counts.sum()) == len(tokens)
        parts = tokens.split(counts.tolist())
        outputs = torch.cat([expert(rank * per_rank + i, part) for i, part in enumerate(parts)])
        total += dispatched.combine(outputs)
    expected = torch.zeros_like(hidden)
    for t in range(NUM_TOKENS):
        for e, score in zip(expert_ids[t].tolist(), scores[t], strict=True):
            expected[t] += expert(e, hidden[t] * score) if scales_inputs else expert(e, hidden[t]) * score
    torch.testing.assert_close(total, expected)


def test_scores_may_be_more_exact_than_the_tokens() -> None:
    dispatch = ReplicatedDispatch(0, 1, scales_inputs=False)
    hidden = torch.arange(1, 200, dtype=torch.bfloat16)[None]
    score = torch.full((1, 1), 1 / 3)
    dispatched = dispatch.dispatch(hidden, torch.zeros(1, 1, dtype=torch.int64), score)
    tokens = dispatched.receive().tokens
    assert tokens.dtype == torch.bfloat16
    assert dispatched.combine(tokens).equal((hidden.float() * score).bfloat16())
    assert not (hidden * score.bfloat16()).equal((hidden.float() * score).bfloat16())


@pytest.mark.parametrize("scales_inputs", [True, False])
def test_a_rank_without_tokens(scales_inputs: bool) -> None:
    dispatch = ReplicatedDispatch(4, 4, scales_inputs=scales_inputs)
    hidden = torch.ones(3, HIDDEN)
    dispatched = dispatch.dispatch(hidden, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    tokens, counts = dispatched.receive().tokens, dispatched.receive().counts
    assert tokens.shape == (0, HIDDEN) and counts.tolist() == [0, 0, 0, 0]
    assert dispatched.combine(tokens).eq(0).all()
