"""A layer's routed experts on a GPU without any number that the host would have to wait for: few tokens by a Triton
kernel, many by torch's grouped product (``torch._grouped_mm``, bfloat16, from Hopper on).

T tokens, K experts per token, N = T × K pairs, E local experts, H hidden size, I expert width.
"""

import torch

from engine.kernels.elementwise import silu_multiply
from engine.kernels.gpu import runs_on_gpu

_ALIGNMENT = 8
"""Numbers in 16 bytes, in which the grouped product counts rows."""


def gpu_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    gate_up_weights: torch.Tensor,
    down_weights: torch.Tensor,
    first_expert: int,
    *,
    scales_inputs: bool,
) -> torch.Tensor | None:
    """[T, H]: each token's sum over those of its experts that are here. None where no kernel serves.

    Args: see engine.kernels.triton.routed_experts.
    """
    if not runs_on_gpu(hidden):
        return None
    from engine.kernels.triton.routed_experts import MOST_PAIRS, routed_experts

    if expert_ids.numel() <= MOST_PAIRS:
        compute = routed_experts
    elif has_grouped_kernel(down_weights):
        compute = grouped_experts
    else:
        return None
    return compute(hidden, expert_ids, scores, gate_up_weights, down_weights, first_expert, scales_inputs=scales_inputs)


def gpu_sorted_experts(
    tokens: torch.Tensor, counts: torch.Tensor, gate_up_weights: torch.Tensor, down_weights: torch.Tensor
) -> torch.Tensor | None:
    """[N, H] sorted by local expert, ``counts`` [E] int64 of each, to each row's output [N, H]. None where no kernel
    serves."""
    if not runs_on_gpu(tokens) or not len(tokens):
        return None
    experts = torch.arange(len(counts), device=tokens.device).repeat_interleave(counts, output_size=len(tokens))
    ones = torch.ones(len(tokens), 1, device=tokens.device)
    return gpu_experts(tokens, experts[:, None], ones, gate_up_weights, down_weights, 0, scales_inputs=True)


def has_grouped_kernel(down_weights: torch.Tensor) -> bool:
    """Whether ``grouped_experts`` runs on this GPU as one kernel a product. ``down_weights``: [E, H, I]."""
    _, size, width = down_weights.shape
    return (
        down_weights.dtype is torch.bfloat16
        and size % _ALIGNMENT == width % _ALIGNMENT == 0
        and torch.cuda.get_device_capability(down_weights.device) >= (9, 0)
    )


def grouped_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    gate_up_weights: torch.Tensor,
    down_weights: torch.Tensor,
    first_expert: int,
    *,
    scales_inputs: bool,
) -> torch.Tensor:
    """As ``gpu_experts``, by two grouped products over pairs sorted by expert (MegaBlocks, arXiv 2211.15841).

    Pairs of experts elsewhere come last and belong to no group: what stands in their rows is never used.
    """
    num_tokens, num_choices = expert_ids.shape
    num_experts = len(down_weights)
    local = expert_ids.flatten() - first_expert
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    local, order = local.sort(stable=True)
    experts = torch.arange(num_experts, device=local.device)
    ends = torch.searchsorted(local, experts, right=True)
    pair_scores = scores.flatten()[order, None]
    tokens = hidden[order // num_choices]
    if scales_inputs:
        tokens = (tokens * pair_scores).to(hidden.dtype)
    groups = ends.to(torch.int32)
    gate_up = torch._grouped_mm(tokens, gate_up_weights.transpose(1, 2), offs=groups)
    outputs = torch._grouped_mm(_silu_multiply(gate_up), down_weights.transpose(1, 2), offs=groups)
    if not scales_inputs:
        outputs = (outputs * pair_scores).to(hidden.dtype)
    outputs = outputs.masked_fill((local == num_experts)[:, None], 0.0)
    by_pair = torch.empty_like(outputs)
    by_pair[order] = outputs
    return by_pair.view(num_tokens, num_choices, -1).sum(dim=1)


def _silu_multiply(gate_and_up: torch.Tensor) -> torch.Tensor:
    product = silu_multiply(gate_and_up)
    if product is not None:
        return product
    gate, up = gate_and_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
