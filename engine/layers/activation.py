"""Activation functions of gated feed-forward layers."""

import torch
from torch.nn import functional

from engine.kernels.elementwise import silu_multiply

_STEP = 64
"""Numbers of two vectors of bfloat16, which torch's kernels take together."""


def silu_and_multiply(gate_and_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): silu(gate) · up, of [..., 2 × n] with the gate in the first half; gives [..., n]."""
    size = gate_and_up.shape[-1] // 2
    if missing := -size % _STEP:
        # What is left over of whole vectors is computed otherwise, and which numbers that are depends on the others.
        whole = functional.pad(gate_and_up.unflatten(-1, (2, size)), (0, missing)).flatten(-2)
        return silu_and_multiply(whole)[..., :size]
    product = silu_multiply(gate_and_up)
    if product is not None:
        return product
    gate, up = gate_and_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
