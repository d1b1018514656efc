"""The native routing of tokens to experts, against torch's own operations."""

import pytest
import torch
from torch.nn import functional

from engine.kernels import routing
from engine.kernels.linear import has_tiles
from engine.kernels.routing import Scoring
from engine.layer_config import MoeConfig
from engine.layers.router import SigmoidRouter, SoftmaxRouter
from engine.parallel.mesh import Mesh
from engine.parallel.token_dispatch import ReplicatedDispatch
from engine.parameter import ParameterBuilder

pytestmark = pytest.mark.skipif(not has_tiles(), reason="needs a CPU with AMX and the native library")


def scored(logits: torch.Tensor, scoring: Scoring, expert_ids: torch.Tensor) -> torch.Tensor:
    if scoring is Scoring.SIGMOID:
        return logits.gather(1, expert_ids).sigmoid()
    scores = logits.softmax(-1).gather(1, expert_ids)
    return scores / scores.sum(-1, keepdim=True) if scoring is Scoring.NORMALIZED_SOFTMAX else scores


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 33])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (8, 1), (8, 2), (13, 4), (128, 8), (5, 5)])
@pytest.mark.parametrize("scoring", list(Scoring))
def test_the_largest_logits_are_chosen(scoring: Scoring, num_experts: int, num_chosen: int, num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, 96).bfloat16()
    weight = (torch.randn(num_experts, 96) / 4).bfloat16()
    routed = routing.route(hidden, weight, num_chosen, scoring)
    assert routed is not None
    expert_ids, scores = routed
    assert expert_ids.shape == scores.shape == (num_tokens, num_chosen)
    exact = hidden.double() @ weight.double().t()
    logits = exact.gather(1, expert_ids)
    # The kernel rounds logits to bfloat16: 2⁻⁹ of each, and no more than that may it be wrong in its choice.
    margin = exact.abs().amax(-1, keepdim=True) * 2**-8 if num_tokens else exact[:, :1]
    assert (logits >= exact.topk(num_chosen, dim=-1).values - margin).all()
    assert all(len(set(row)) == num_chosen for row in expert_ids.tolist())
    torch.testing.assert_close(scores.double(), scored(exact, scoring, expert_ids), rtol=0.05, atol=1e-3)


def test_logits_are_those_of_a_product_in_bfloat16() -> None:
    """Sums in float32, rounded once: so the scores are those of rounded logits to float32's precision."""
    hidden, weight = torch.randn(64, 256).bfloat16(), torch.randn(16, 256).bfloat16() / 16
    rounded = functional.linear(hidden.double(), weight.double()).float().bfloat16()
    routed = routing.route(hidden, weight, 16, Scoring.SIGMOID)
    assert routed is not None
    expected = rounded.float().sigmoid().gather(1, routed[0])
    differing = (routed[1] - expected).abs() > 1e-6
    assert differing.double().mean() < 0.01  # sums that lie at a border of rounding


def test_a_token_does_not_depend_on_the_others() -> None:
    hidden, weight = torch.randn(39, 256).bfloat16(), torch.randn(10, 256).bfloat16()
    together = routing.route(hidden, weight, 3, Scoring.NORMALIZED_SOFTMAX)
    assert together is not None
    for i in (0, 4, 37, 38):
        alone = routing.route(hidden[i : i + 1], weight, 3, Scoring.NORMALIZED_SOFTMAX)
        assert alone is not None
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize("scoring", list(Scoring))
def test_equal_and_undefined_logits_choose_distinct_experts(scoring: Scoring) -> None:
    weight = torch.ones(6, 32).bfloat16()
    equal = routing.route(torch.ones(1, 32).bfloat16(), weight, 3, scoring)
    assert equal is not None and equal[0].tolist() == [[0, 1, 2]]
    undefined = routing.route(torch.full((1, 32), torch.nan).bfloat16(), weight, 3, scoring)
    assert undefined is not None and undefined[0].tolist() == [[0, 1, 2]] and undefined[1].isnan().all()
    weight[4, 7] = torch.nan
    one = routing.route(torch.ones(1, 32).bfloat16(), weight, 1, scoring)
    assert one is not None and one[0].tolist() == [[4]] and one[1].isnan().all()


def test_routers_do_the_same_with_and_without_the_kernel() -> None:
    """Of logits without ties, which the two may break differently."""
    build = ParameterBuilder(Mesh(), torch.bfloat16, torch.device("cpu"))
    weight = torch.randn(8, 64).bfloat16()
    for router in (
        SigmoidRouter(build, "a", 64, MoeConfig(8, 2, 64)),
        SoftmaxRouter(build, "b", 64, MoeConfig(8, 2, 64)),
        SoftmaxRouter(build, "c", 64, MoeConfig(8, 2, 64, normalize_scores=True)),
    ):
        router.weight.data.copy_(weight)
        hidden = torch.randn(100, 64).bfloat16()
        logits = functional.linear(hidden.float(), weight.float()).bfloat16()
        distinct = torch.tensor([len(set(row)) == 8 for row in logits.tolist()])
        with torch.inference_mode():
            ours, expected = router.forward(hidden[distinct]), router.choose(logits[distinct])
        same = (ours[0] == expected[0]).all(-1)
        assert same.double().mean() > 0.97  # a sum at a border of rounding may fall to either side
        torch.testing.assert_close(ours[1][same], expected[1][same], rtol=2**-6, atol=0)


@pytest.mark.parametrize("scales_inputs", [True, False])
@pytest.mark.parametrize("num_chosen", [1, 2, 4])
@pytest.mark.parametrize(("first", "num_local"), [(0, 8), (4, 4), (7, 1)])
def test_dispatch_and_combine_are_torchs(first: int, num_local: int, num_chosen: int, scales_inputs: bool) -> None:
    """In float32 the same class uses torch's operations."""
    num_tokens, hidden_size = 37, 64
    hidden = torch.randn(num_tokens, hidden_size).bfloat16()
    scores, expert_ids = torch.rand(num_tokens, 8).topk(num_chosen, dim=-1)
    dispatch = ReplicatedDispatch(first, num_local, scales_inputs=scales_inputs)
    ours = dispatch.dispatch(hidden, expert_ids, scores)
    theirs = dispatch.dispatch(hidden.float(), expert_ids, scores)
    tokens, expected = ours.receive().tokens, theirs.receive().tokens
    assert tokens.dtype is torch.bfloat16 and torch.equal(tokens, expected.bfloat16())
    assert torch.equal(ours.receive().counts, theirs.receive().counts)
    assert torch.equal(ours.token_rows, theirs.token_rows)
    outputs = torch.randn(len(tokens), hidden_size).bfloat16()
    combined = ours.combine(outputs)
    summed = theirs.combine(outputs.float())
    # Rounded once, whatever the number of summands.
    torch.testing.assert_close(combined.float(), summed, rtol=2**-8, atol=1e-6)
