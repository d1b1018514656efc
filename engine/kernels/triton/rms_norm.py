"""Root-mean-square norm (arXiv 1910.07467), by itself or after the addition of a residual: one pass over memory.

A program takes one row. Sums are float32; the quotient is rounded before the weight multiplies it, as in torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import power_of_2

_ELEMENTS_PER_WARP = 512
_MOST_WARPS = 16


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """[..., n] ÷ the root mean square of each row, rounded, × ``weight`` [n]. bfloat16 or float32; n at most 65536.

    A view of neighbouring columns (the queries among q, k and v) is read in place.
    """
    size = hidden.shape[-1]
    if hidden.dim() != 3 or hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    rows = hidden if hidden.dim() == 3 else hidden.view(-1, 1, size)
    output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    num_rows = rows.shape[0] * rows.shape[1]
    if num_rows:
        _rms_norm[(num_rows,)](
            rows, weight, output, rows.shape[1], *rows.stride()[:2], size, eps, **_shape(size, weight is not None)
        )
    return output


def add_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual`` + ``update``, both [T, n], and its norm × ``weight`` [n]: two tensors [T, n] of the same format."""
    size = residual.shape[-1]
    residual, update = residual.contiguous(), update.contiguous()
    total, output = torch.empty_like(residual), torch.empty_like(residual)
    if residual.numel():
        num_rows = residual.numel() // size
        _add_rms_norm[(num_rows,)](residual, update, weight, total, output, size, eps, **_shape(size, True))
    return total, output


def _shape(size: int, has_weight: bool) -> dict[str, Any]:
    block = power_of_2(size)
    num_warps = min(_MOST_WARPS, max(1, block // _ELEMENTS_PER_WARP))
    return {"HAS_WEIGHT": has_weight, "BLOCK": block, "num_warps": num_warps}


@triton.jit
def _normalized(
    row: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    dtype: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
) -> Any:
    """A row [BLOCK] of float32, normalized, rounded to ``dtype`` and weighted: float32."""
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / size + eps)
    normalized = row * scale
    if HAS_WEIGHT:
        factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        normalized = normalized.to(dtype).to(tl.float32) * factor
    return normalized


@triton.jit
def _rms_norm(
    rows: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    rows_per_token: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    start = index // rows_per_token * token_stride + index % rows_per_token * row_stride
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    row = tl.load(rows + start + columns, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = output.dtype.element_ty
    normalized = _normalized(row, weight, columns, mask, size, eps, dtype, HAS_WEIGHT)
    tl.store(output + index * size + columns, normalized.to(dtype), mask=mask)


@triton.jit
def _add_rms_norm(
    residual: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    output: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    dtype: tl.constexpr = output.dtype.element_ty
    row = tl.load(residual + start + columns, mask=mask, other=0.0).to(tl.float32)
    row += tl.load(update + start + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = row.to(dtype)
    tl.store(total + start + columns, rounded, mask=mask)
    normalized = _normalized(rounded.to(tl.float32), weight, columns, mask, size, eps, dtype, HAS_WEIGHT)
    tl.store(output + start + columns, normalized.to(dtype), mask=mask)
