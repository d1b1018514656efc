"""A mixture of experts as one native call: the same bits as part by part, wherever the placement table has experts."""

import ctypes

import pytest
import torch

from engine.config import ParallelConfig
from engine.kernels.linear import has_tiles
from engine.kernels.mixture import NativeMixture
from engine.kernels.native_library import tile_library
from engine.layer_config import MoeConfig
from engine.layers.experts import ExpertNames, make_experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.moe import MixtureOfExperts
from engine.layers.router import SigmoidRouter, SoftmaxRouter
from engine.parallel.expert_balance import ExpertPlacement
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder

pytestmark = pytest.mark.skipif(not has_tiles(), reason="needs a CPU with AMX and the native library")

HIDDEN_SIZE = 64
PLACEMENTS = [((5, 3, 0, 1), (2, 4, 5, 0)), ((0, 1, 2, 3), (0, 1, 4, 5))]
"""Six experts on two ranks, two of them in two copies."""


def random_mixture(rank: int, moe: MoeConfig) -> MixtureOfExperts:
    """Of one of two ranks, which hold the same tokens; nothing is reduced."""
    mesh = Mesh(ParallelConfig(tp=2, ep=2, num_redundant_experts=2, balances_experts=True), rank)
    build = ParameterBuilder(mesh, torch.bfloat16, torch.device("cpu"))
    experts = make_experts(build.at("experts"), HIDDEN_SIZE, moe, ExpertNames())
    shared = GatedFeedForward(build.at("shared"), HIDDEN_SIZE, 192) if moe.has_shared_expert else None
    router = (SigmoidRouter if moe.has_shared_expert else SoftmaxRouter)(build, "router", HIDDEN_SIZE, moe)
    mixture = MixtureOfExperts(mesh, router, experts, shared_expert=shared, scales_inputs=moe.has_shared_expert)
    for parameter in mixture.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 1.5 / HIDDEN_SIZE**0.5)
    return mixture


def native_summand(native: NativeMixture, tokens: torch.Tensor) -> torch.Tensor:
    library = tile_library()
    assert library is not None
    output = torch.full_like(tokens, torch.nan)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (tokens, output)]
    library.remuda_mixture(ctypes.byref(native), *addresses, ctypes.c_int64(len(tokens)))
    return output


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "moe",
    [MoeConfig(6, 1, 96, has_shared_expert=True), MoeConfig(6, 3, 64, normalize_scores=True)],
    ids=["llama4", "mixtral"],
)
@torch.inference_mode()
def test_the_table_is_read_in_every_step(moe: MoeConfig, rank: int) -> None:
    mixture = random_mixture(rank, moe)
    found = mixture.native()
    assert found is not None
    for slots in PLACEMENTS:
        mixture.table.set(ExpertPlacement(slots))
        for num_tokens in (1, 7, 90):
            tokens = torch.randn(num_tokens, HIDDEN_SIZE).bfloat16()
            mixture.loads.zero_()
            expected = mixture.forward(tokens)
            counted = mixture.loads.tolist()
            mixture.loads.zero_()
            assert torch.equal(native_summand(found[0], tokens), expected)
            assert mixture.loads.tolist() == counted
            assert sum(counted) > 0 or num_tokens == 1


def test_a_format_that_the_kernel_does_not_know_has_no_native_mixture() -> None:
    assert random_mixture(0, MoeConfig(6, 2, 40)).native() is None
