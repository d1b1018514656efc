"""The native experts: against float64, against the single products, and whole mixtures against transformers' layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Llama4TextConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from engine.kernels.experts import ExpertMatrices, GroupedExperts, can_group
from engine.kernels.linear import has_tiles, linear, linear_int8
from engine.layer_config import MoeConfig
from engine.layers.activation import silu_and_multiply
from engine.layers.experts import ExpertNames, StackedExperts, make_experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.moe import MixtureOfExperts
from engine.layers.router import Router, SigmoidRouter, SoftmaxRouter
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="needs a CPU with AMX and the native library")

COUNTS = [(1,), (0, 1, 0, 0), (3, 0, 16, 17), (0, 0, 0), (32, 33, 0, 129), (0, 300, 5)]
SIZES = [(64, 64), (256, 192), (128, 320)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bf16_experts(num_experts: int, hidden_size: int, width: int) -> list[ExpertMatrices]:
    """Such that values stay about as large as the inputs."""
    gate_ups = torch.randn(num_experts, 2 * width, hidden_size) * 2 / hidden_size**0.5
    downs = torch.randn(num_experts, hidden_size, width) / width**0.5
    return [ExpertMatrices(*pair) for pair in zip(gate_ups.bfloat16(), downs.bfloat16(), strict=True)]


def int8_experts(num_experts: int, hidden_size: int, width: int) -> list[ExpertMatrices]:
    return [
        ExpertMatrices(
            torch.randint(-127, 128, (2 * width, hidden_size), dtype=torch.int8),
            torch.randint(-127, 128, (hidden_size, width), dtype=torch.int8),
            (torch.rand(2 * width) + 0.1) / hidden_size**0.5 / 30,
            (torch.rand(hidden_size) + 0.1) / width**0.5 / 60,
        )
        for _ in range(num_experts)
    ]


def of_each(
    tokens: torch.Tensor, counts: tuple[int, ...], compute: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return torch.cat([compute(expert, part) for expert, part in enumerate(tokens.split(counts))])


@needs_tiles
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("hidden_size", "width"), [*SIZES, (96, 32)])
def test_bf16_is_near_float64(counts: tuple[int, ...], hidden_size: int, width: int) -> None:
    experts = bf16_experts(len(counts), hidden_size, width)
    tokens = torch.randn(sum(counts), hidden_size).bfloat16()

    def inner(expert: int, part: torch.Tensor) -> torch.Tensor:
        gate, up = (part.double() @ experts[expert].gate_up.double().t()).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def exact(expert: int, part: torch.Tensor) -> torch.Tensor:
        return inner(expert, part) @ experts[expert].down.double().t()

    def magnitudes(expert: int, part: torch.Tensor) -> torch.Tensor:
        return inner(expert, part).abs() @ experts[expert].down.double().abs().t()

    outputs = GroupedExperts(experts).forward(tokens, torch.tensor(counts))
    error = (outputs.double() - of_each(tokens, counts, exact)).abs()
    # Roundings to bfloat16, 2⁻⁹ each: of gate, up, silu(gate), inner value and output.
    assert (error <= of_each(tokens, counts, magnitudes) * 5 * 2**-9).all()


@needs_tiles
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("hidden_size", "width"), SIZES)
def test_bf16_equals_single_products(counts: tuple[int, ...], hidden_size: int, width: int) -> None:
    experts = bf16_experts(len(counts), hidden_size, width)
    tokens = torch.randn(sum(counts), hidden_size).bfloat16()

    def one_by_one(expert: int, part: torch.Tensor) -> torch.Tensor:
        rows = [row[None] for row in part]
        inner = [silu_and_multiply(linear(row, experts[expert].gate_up)) for row in rows]
        return torch.cat([linear(row, experts[expert].down) for row in inner]) if rows else part

    outputs = GroupedExperts(experts).forward(tokens, torch.tensor(counts))
    assert torch.equal(outputs, of_each(tokens, counts, one_by_one))


@needs_tiles
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("hidden_size", "width"), SIZES)
def test_int8_equals_single_products(counts: tuple[int, ...], hidden_size: int, width: int) -> None:
    """Which are held to exact sums in test_kernel_linear.py."""
    experts = int8_experts(len(counts), hidden_size, width)
    tokens = (torch.randn(sum(counts), hidden_size) * 10 ** torch.randn(sum(counts), 1)).bfloat16()
    tokens[-1:] = 0

    def one_by_one(expert: int, part: torch.Tensor) -> torch.Tensor:
        one = experts[expert]
        assert one.gate_up_scales is not None and one.down_scales is not None
        inner = silu_and_multiply(linear_int8(part, one.gate_up, one.gate_up_scales))
        return linear_int8(inner, one.down, one.down_scales)

    outputs = GroupedExperts(experts).forward(tokens, torch.tensor(counts))
    assert torch.equal(outputs, of_each(tokens, counts, one_by_one))
    assert outputs.isfinite().all()


@needs_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", [bf16_experts, int8_experts])
def test_what_is_not_finite_shows_in_its_token_alone(
    make: Callable[[int, int, int], list[ExpertMatrices]], value: float
) -> None:
    experts = GroupedExperts(make(2, 128, 64))
    counts = torch.tensor([18, 5])
    tokens = torch.randn(23, 128).bfloat16()
    expected = experts.forward(tokens, counts)
    broken = tokens.clone()
    broken[17, 100] = value
    outputs = experts.forward(broken, counts)
    others = torch.arange(23) != 17
    assert not outputs[17].isfinite().any()
    assert torch.equal(outputs[others], expected[others])


@needs_tiles
@pytest.mark.parametrize("scale", [2.0**-118, 2.0**-126, 2.0**-133])
def test_int8_of_the_smallest_numbers(scale: float) -> None:
    """What tokens would be multiplied by is beyond float32; inner values, about squares, are zero."""
    tokens = (torch.randn(3, 64).sign() * scale).bfloat16()
    outputs = GroupedExperts(int8_experts(1, 64, 64)).forward(tokens, torch.tensor([3]))
    assert outputs.eq(0).all()


def test_shapes_that_the_kernel_does_not_take() -> None:
    assert not can_group(bf16_experts(1, 64, 48))
    assert not can_group(bf16_experts(1, 48, 64))
    assert not can_group(int8_experts(1, 64, 96))
    single = torch.zeros(64, 64)
    assert not can_group([ExpertMatrices(single, single)])


def mixture(
    router: type[Router], moe: MoeConfig, hidden_size: int, device: str = "cpu", **options: bool
) -> MixtureOfExperts:
    """With nothing loaded."""
    build = ParameterBuilder(Mesh(), torch.bfloat16, torch.device(device))
    experts = make_experts(build.at("experts"), hidden_size, moe, ExpertNames())
    shared = None
    if moe.has_shared_expert:
        shared = GatedFeedForward(build.at("shared_expert"), hidden_size, moe.intermediate_size)
    return MixtureOfExperts(
        build.mesh, router(build, "router", hidden_size, moe), experts, shared_expert=shared, **options
    )


def load(ours: MixtureOfExperts, router: torch.Tensor, gate_ups: torch.Tensor, downs: torch.Tensor) -> None:
    experts = ours.experts
    assert isinstance(experts, StackedExperts)
    ours.router.weight.data.copy_(router)
    experts.gate_up_weights.data.copy_(gate_ups)
    experts.down_weights.data.copy_(downs)


def llama4(moe: MoeConfig, hidden_size: int) -> tuple[MixtureOfExperts, Any]:
    known = Llama4TextConfig(
        hidden_size=hidden_size,
        intermediate_size=moe.intermediate_size,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
    )
    theirs = randomized(Llama4TextMoe(known), hidden_size)
    ours = mixture(SigmoidRouter, moe, hidden_size, scales_inputs=True)
    experts = theirs.experts
    load(ours, theirs.router.weight, experts.gate_up_proj.transpose(1, 2), experts.down_proj.transpose(1, 2))
    shared = theirs.shared_expert
    assert ours.shared_expert is not None
    into = dict(ours.shared_expert.named_parameters())
    into["gate_up.matrix.weight"].data.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
    into["down.matrix.weight"].data.copy_(shared.down_proj.weight)
    return ours, theirs


def mixtral(moe: MoeConfig, hidden_size: int) -> tuple[MixtureOfExperts, Any]:
    known = MixtralConfig(
        hidden_size=hidden_size,
        intermediate_size=moe.intermediate_size,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
    )
    theirs = randomized(MixtralSparseMoeBlock(known), hidden_size)
    ours = mixture(SoftmaxRouter, moe, hidden_size)
    load(ours, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
    return ours, theirs


def qwen3(moe: MoeConfig, hidden_size: int) -> tuple[MixtureOfExperts, Any]:
    known = Qwen3MoeConfig(
        hidden_size=hidden_size,
        moe_intermediate_size=moe.intermediate_size,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
        norm_topk_prob=moe.normalize_scores,
    )
    theirs = randomized(Qwen3MoeSparseMoeBlock(known), hidden_size)
    ours = mixture(SoftmaxRouter, moe, hidden_size)
    load(ours, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
    return ours, theirs


def randomized(module: nn.Module, hidden_size: int) -> Any:
    """In float64, of values that bfloat16 can hold."""
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape) * 1.5 / hidden_size**0.5).bfloat16().double()
    return module.eval()


@pytest.mark.parametrize("num_tokens", [1, 7, 200])
@pytest.mark.parametrize(
    ("make", "moe"),
    [
        (llama4, MoeConfig(8, 1, 192, has_shared_expert=True)),
        (llama4, MoeConfig(6, 2, 64, has_shared_expert=True)),
        (mixtral, MoeConfig(8, 2, 192, normalize_scores=True)),
        (qwen3, MoeConfig(13, 4, 64, normalize_scores=True)),
        (qwen3, MoeConfig(16, 3, 64)),
        (qwen3, MoeConfig(9, 2, 40)),  # a width that the kernel does not take
    ],
)
@torch.inference_mode()
def test_mixtures_are_transformers(
    make: Callable[[MoeConfig, int], tuple[MixtureOfExperts, Any]], moe: MoeConfig, num_tokens: int
) -> None:
    hidden_size = 128
    ours, theirs = make(moe, hidden_size)
    hidden = torch.randn(4 * num_tokens, hidden_size).bfloat16()
    # Where logits are so near that rounding them to bfloat16 may change the choice, both choices are right.
    logits = (hidden.double() @ ours.router.weight.double().t()).sort(descending=True).values
    last, next_best = logits[:, moe.num_experts_per_token - 1], logits[:, moe.num_experts_per_token]
    hidden = hidden[last - next_best > logits.abs().amax(-1) * 2**-7][:num_tokens]
    assert len(hidden) == num_tokens
    expected = theirs(hidden[None].double())
    expected = (expected[0] if isinstance(expected, tuple) else expected).view(num_tokens, hidden_size)
    # Roundings to bfloat16 (2⁻⁹ each) of tokens, scores, inner values and outputs, of the size of the largest outputs.
    error = (ours.forward(hidden).double() - expected).abs()
    assert error.max() <= expected.abs().max() * 2**-6
    assert error.square().mean() <= expected.square().mean() * 2**-14
