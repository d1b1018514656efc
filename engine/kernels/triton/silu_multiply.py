"""SwiGLU's activation (arXiv 2002.05202) in one pass over memory."""

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import cdiv

_BLOCK = 1024


def silu_multiply(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate), rounded, × up, of [..., 2 × n] with the gate in the first half: [..., n]. bfloat16 or float32."""
    gate_and_up = gate_and_up.contiguous()
    size = gate_and_up.shape[-1] // 2
    output = gate_and_up.new_empty(*gate_and_up.shape[:-1], size)
    if output.numel():
        _silu_multiply[(output.numel() // size, cdiv(size, _BLOCK))](gate_and_up, output, size, BLOCK=_BLOCK)
    return output


@triton.jit
def _silu_multiply(gate_and_up: tl.tensor, output: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    start = gate_and_up + row * 2 * size
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + size + columns, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = output.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(output + row * size + columns, (activated * up).to(dtype), mask=mask)
