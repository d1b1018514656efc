"""Tokens of several dp groups reach the ranks of their experts and come back whole, over any placement of the experts,
against a dense mixture in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.batch import StepAdapters
from engine.config import Determinism, ParallelConfig
from engine.parallel.all_to_all_dispatch import AllToAllDispatch
from engine.parallel.collectives import Collectives, ReceivedRows
from engine.parallel.distributed import init_distributed
from engine.parallel.expert_balance import ExpertPlacement, balanced_placement, linear_placement
from engine.parallel.expert_table import ExpertTable
from engine.parallel.lasting_axis import LastingAxis
from tests.support.rank_pool import RankContext, run_ranks

pytestmark = pytest.mark.timeout(90)

NUM_EXPERTS, HIDDEN, WIDTH = 8, 6, 8


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """[E, WIDTH, HIDDEN] and [E, HIDDEN, WIDTH] in float64."""
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(NUM_EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    down = torch.randn(NUM_EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
    return up, down


def expert(index: int, tokens: torch.Tensor, columns: slice) -> torch.Tensor:
    """The summand of some of the expert's width."""
    up, down = weights()
    return torch.relu(tokens @ up[index, columns].t()) @ down[index, :, columns].t()


def adapter_shift(slots: torch.Tensor) -> torch.Tensor:
    """What a token's adapter adds to its expert's output: so that one that got lost or was swapped shows."""
    return (slots.clamp(min=-1) + 1).double()[:, None]


def dense(
    tokens: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, slots: torch.Tensor, scales: bool
) -> torch.Tensor:
    total = torch.zeros_like(tokens)
    for t in range(len(tokens)):
        for e, score in zip(ids[t].tolist(), scores[t].double(), strict=True):
            inputs = tokens[t : t + 1] * score if scales else tokens[t : t + 1]
            output = expert(e, inputs, slice(None)) + adapter_shift(slots[t : t + 1])
            total[t] += output[0] if scales else output[0] * score
    return total


def random_placement(random: np.random.Generator, ep: int) -> ExpertPlacement:
    """Linear, or with copies of what a random load makes hot."""
    fewest = -(-NUM_EXPERTS // ep)
    if random.random() < 0.3:
        return linear_placement(NUM_EXPERTS, ep, fewest)
    num_slots = int(random.integers(fewest, NUM_EXPERTS + 1))
    return balanced_placement(random.pareto(1.0, NUM_EXPERTS).tolist(), [ep], num_slots)


def mixtures(context: RankContext, parallel: ParallelConfig, seed: int) -> int:
    """Rounds of random tokens through random placements. All ranks draw the same numbers, and so know what is right."""
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), 20.0)
    random = np.random.default_rng(seed)
    columns = slice(
        mesh.expert_tp_rank * WIDTH // parallel.expert_tp, (mesh.expert_tp_rank + 1) * WIDTH // parallel.expert_tp
    )
    num_received = 0
    for number in range(25):
        placement, scales = random_placement(random, parallel.ep), bool(random.random() < 0.5)
        sizes = random.integers(0, 20, parallel.dp) * (random.random(parallel.dp) < 0.7)
        num_chosen = int(random.integers(1, 4))
        # Skewed routing: most tokens go to a few experts.
        skew = torch.from_numpy(random.pareto(1.0, NUM_EXPERTS))
        groups = []
        for size in sizes.tolist():
            tokens = torch.from_numpy(random.standard_normal((size, HIDDEN)))
            noise = torch.from_numpy(random.random((size, NUM_EXPERTS)))
            scores, ids = (noise * skew).topk(num_chosen, dim=-1)
            slots = torch.from_numpy(random.integers(-1, 3, size)) if random.random() < 0.5 else torch.full((size,), -1)
            groups.append((tokens, ids, scores.float(), slots))
        dispatch = AllToAllDispatch(
            mesh, ExpertTable(NUM_EXPERTS, placement, offset=mesh.expert_index), scales_inputs=scales
        )
        tokens, ids, scores, slots = groups[mesh.dp_rank]
        share = dispatch.share(len(tokens))
        adapters = StepAdapters.of(slots[share].tolist(), torch.device("cpu"))
        dispatched = dispatch.dispatch(tokens[share], ids[share], scores[share], adapters)
        arrived = dispatched.receive()
        assert len(arrived.counts) == len(placement.slots[0]) and int(arrived.counts.sum()) == len(arrived.tokens)
        num_received += len(arrived.tokens)
        parts = arrived.tokens.split(arrived.counts.tolist())
        local = placement.slots[mesh.ep_rank]
        outputs = torch.cat([expert(local[slot], part, columns) for slot, part in enumerate(parts)])
        if arrived.adapters is not None and mesh.expert_tp_rank == 0:
            outputs += adapter_shift(arrived.adapters.slots)
        whole = torch.zeros_like(tokens)
        whole[share] = dispatched.combine(outputs)
        gathered = mesh.tp.all_gather_last_dim(whole.float()[None]).view(-1) if len(whole) else whole.float().view(-1)
        summed = gathered.view(1, len(whole), parallel.tp, HIDDEN).sum(2)[0] if len(whole) else whole.float()
        expected = dense(tokens, ids, scores, slots, scales)
        torch.testing.assert_close(whole[share], expected[share], rtol=1e-9, atol=1e-9, msg=f"round {number}")
        torch.testing.assert_close(summed, expected.float(), rtol=1e-4, atol=1e-5, msg=f"round {number}")
    return num_received


LAYOUTS = [
    ParallelConfig(dp=2, ep=2),
    ParallelConfig(dp=2, ep=1),
    ParallelConfig(dp=2, tp=2, ep=4),
    ParallelConfig(dp=2, tp=2, ep=2),
    ParallelConfig(dp=4, ep=2),
    ParallelConfig(dp=3, tp=2, ep=3),
]


@pytest.mark.parametrize("determinism", [Determinism.OFF, Determinism.D1])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"dp{p.dp}-tp{p.tp}-ep{p.ep}")
def test_groups_get_what_a_dense_mixture_gives(parallel: ParallelConfig, determinism: Determinism, seed: int) -> None:
    parallel = replace(parallel, determinism=determinism)
    assert sum(run_ranks(mixtures, parallel.num_ranks, parallel, seed)) > 0


def in_one_order(context: RankContext) -> bool:
    """Whether the sums are, bit by bit, those by ascending expert, wherever the experts are. Each multiplies."""
    parallel = ParallelConfig(dp=2, ep=2, determinism=Determinism.D1)
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), 20.0)
    random, generator = np.random.default_rng(7), torch.Generator().manual_seed(context.rank)
    factors = torch.rand(NUM_EXPERTS)
    factors = mesh.stage.broadcast(factors)
    are_equal = True
    for _ in range(10):
        placement = random_placement(random, parallel.ep)
        hidden = torch.randn(11, HIDDEN, generator=generator)
        scores, ids = torch.rand(11, NUM_EXPERTS, generator=generator).topk(3, dim=-1)
        dispatched = AllToAllDispatch(mesh, ExpertTable(NUM_EXPERTS, placement), scales_inputs=False).dispatch(
            hidden, ids, scores
        )
        arrived = dispatched.receive()
        local = torch.tensor(placement.slots[mesh.ep_rank]).repeat_interleave(arrived.counts)
        combined = dispatched.combine(arrived.tokens * factors[local, None])
        ids, order = ids.sort(dim=1)
        scores = scores.gather(1, order)
        expected = torch.zeros_like(hidden)
        for chosen in range(3):
            expected += hidden * factors[ids[:, chosen], None] * scores[:, chosen, None]
        are_equal &= torch.equal(combined, expected)
    return are_equal


def test_sums_have_one_order_under_d1() -> None:
    assert run_ranks(in_one_order, 2) == [True, True]


class CountedAxis(LastingAxis):
    """Notes how many rows go to which rank, one all-to-all after the other."""

    def __init__(self, group: Collectives) -> None:
        super().__init__(group)
        self.counts: list[list[int]] = []

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        self.counts.append(counts.tolist())
        return super().post_rows(rows, counts, expected)


def rows_sent(context: RankContext) -> list[list[int]]:
    """There and back. Rank 0 has three tokens; experts 0 to 3 are on rank 0, 4 to 7 on rank 1."""
    mesh = init_distributed(ParallelConfig(dp=2, ep=2), context.rank, context.store, torch.device("cpu"), 20.0)
    axis = CountedAxis(mesh.stage)
    table = ExpertTable(NUM_EXPERTS, linear_placement(NUM_EXPERTS, 2, 4))
    dispatch = AllToAllDispatch(replace(mesh, stage=axis), table, scales_inputs=False)
    ids = torch.tensor([[0, 1, 2], [4, 3, 5], [7, 6, 5]]) if context.rank == 0 else torch.empty(0, 3, dtype=torch.int64)
    dispatched = dispatch.dispatch(torch.ones(len(ids), HIDDEN), ids, torch.ones(len(ids), 3))
    assert torch.equal(dispatched.combine(dispatched.receive().tokens), torch.full((len(ids), HIDDEN), 3.0))
    return axis.counts


def test_a_token_travels_once_to_each_rank_that_has_its_experts() -> None:
    assert run_ranks(rows_sent, 2) == [[[2, 2], [2, 0]], [[0, 0], [2, 0]]]


def rounded_twice(context: RankContext) -> bool:
    """bfloat16 through the tile kernels' formats: summands are added in float32, and rounded at either end."""
    parallel = ParallelConfig(dp=2, ep=1)
    mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), 20.0)
    dispatch = AllToAllDispatch(mesh, ExpertTable(4, linear_placement(4, 1, 4)), scales_inputs=False)
    hidden = torch.randn(9, 64).bfloat16()
    scores, ids = torch.rand(9, 4).topk(4, dim=-1)
    dispatched = dispatch.dispatch(hidden, ids, scores)
    arrived = dispatched.receive()
    assert arrived.tokens.dtype is torch.bfloat16
    combined = dispatched.combine(arrived.tokens)
    exact = hidden.double() * 2 * scores.double().sum(1, keepdim=True)
    return bool(((combined.double() - exact).abs() <= exact.abs() * 2**-8).all())


def test_sums_are_rounded_at_either_end() -> None:
    assert run_ranks(rounded_twice, 2) == [True, True]
