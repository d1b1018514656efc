"""A mixture of experts as native code takes it."""

import torch

from engine.kernels.experts import GroupedExperts, can_group
from engine.kernels.mixture import NativeMixture, PlacedExperts
from engine.layers.experts import Experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.native_matrices import native_linears
from engine.layers.router import Router
from engine.parallel.expert_table import ExpertTable

_STEP = 32
"""The router's products take so many numbers together."""


def native_mixture(
    router: Router,
    experts: Experts,
    table: ExpertTable,
    shared_expert: GatedFeedForward | None,
    loads: torch.Tensor | None,
    *,
    scales_inputs: bool,
) -> tuple[NativeMixture, tuple[object, ...]] | None:
    """And what it has addresses of; None where a part is in a format that the native one does not know.

    ``loads``: see PlacedExperts.
    """
    matrices = experts.matrices()
    weight = router.weight
    if matrices is None or not can_group(matrices) or weight.dtype is not torch.bfloat16 or weight.shape[1] % _STEP:
        return None
    shared, kept = None, []
    if shared_expert is not None:
        linears = native_linears(shared_expert.gate_up, shared_expert.down)
        if linears is None:
            return None
        (gate_up, first), (down, second) = linears
        shared, kept = (gate_up, down), first + second
    num_copies, copies, first_turn = table.copies
    grouped = GroupedExperts(matrices)
    placed = PlacedExperts(grouped, num_copies, copies, first_turn, experts.first_slot, experts.num_slots, loads)
    mixture = placed.mixture(weight, router.num_chosen, router.scoring, shared, scales_inputs=scales_inputs)
    return mixture, (placed, weight, *kept)
