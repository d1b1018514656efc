"""Activation functions of gated feed-forward layers."""

import torch
from torch.nn import functional

from engine.kernels.elementwise import silu_multiply


def silu_and_multiply(gate_and_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): silu(gate) · up, of [..., 2 × n] with the gate in the first half; gives [..., n]."""
    product = silu_multiply(gate_and_up)
    if product is not None:
        return product
    gate, up = gate_and_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
