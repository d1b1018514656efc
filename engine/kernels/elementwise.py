"""What lies between matrix products, each in one pass over memory: over bfloat16 numbers on CPUs with tile units, and
on GPUs by Triton's kernels.

Each returns None where the kernel does not take its arguments: torch's own operations then do it.
"""

import ctypes
import functools
from typing import Any

import torch

from engine.kernels.gpu import runs_on_gpu
from engine.kernels.native_library import tile_library

_STEP = 16


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor | None:
    """[..., n] ÷ the root mean square of each row, rounded, × ``weight`` [n]."""
    if runs_on_gpu(hidden):
        from engine.kernels.triton import rms_norm as kernels

        return kernels.rms_norm(hidden, weight, eps)
    library = _library()
    size = hidden.shape[-1]
    if library is None or not _is_bfloat16_on_cpu(hidden) or size % _STEP:
        return None
    hidden = hidden.contiguous()
    output = torch.empty_like(hidden)
    pointer = None if weight is None else weight.data_ptr()
    library.remuda_rms_norm(hidden.data_ptr(), pointer, output.data_ptr(), hidden.numel() // size, size, eps)
    return output


def add_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sum of two [T, n], and its ``rms_norm``. ``residual`` may become the sum."""
    if runs_on_gpu(residual):
        from engine.kernels.triton import rms_norm as kernels

        return kernels.add_rms_norm(residual, update, weight, eps)
    library = _library()
    num_rows, size = residual.shape
    if library is None or not _is_bfloat16_on_cpu(residual) or size % _STEP or not residual.is_contiguous():
        return None
    if update.dtype is not torch.bfloat16 or not update.is_contiguous():
        return None
    output = torch.empty_like(residual)
    library.remuda_add_rms_norm(
        residual.data_ptr(), update.data_ptr(), weight.data_ptr(), output.data_ptr(), num_rows, size, eps
    )
    return residual, output


def silu_multiply(gate_and_up: torch.Tensor) -> torch.Tensor | None:
    """silu(gate), rounded, × up, of [..., 2 × n] with the gate in the first half: [..., n]."""
    if runs_on_gpu(gate_and_up):
        from engine.kernels.triton import silu_multiply as kernels

        return kernels.silu_multiply(gate_and_up)
    library = _library()
    size = gate_and_up.shape[-1] // 2
    if library is None or not _is_bfloat16_on_cpu(gate_and_up) or size % _STEP:
        return None
    gate_and_up = gate_and_up.contiguous()
    output = gate_and_up.new_empty(*gate_and_up.shape[:-1], size)
    library.remuda_silu_multiply(gate_and_up.data_ptr(), output.data_ptr(), output.numel() // size, size)
    return output


def rotate_halves(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """Rotary embedding of [T, num_heads, d], in float32 and rounded once; ``cos``, ``sin``: [T, 1, d / 2] float32."""
    if runs_on_gpu(heads):
        return _rotate_on_gpu(heads, cos, sin, interleaved=False)
    return _rotate_on_cpu(heads, cos, sin, interleaved=False)


def rotate_pairs(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """The same where element 2i turns with element 2i + 1."""
    if runs_on_gpu(heads):
        return _rotate_on_gpu(heads, cos, sin, interleaved=True)
    return _rotate_on_cpu(heads, cos, sin, interleaved=True)


def _rotate_on_cpu(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor | None:
    library = _library()
    num_tokens, num_heads, head_dim = heads.shape
    if (
        library is None
        or not _is_bfloat16_on_cpu(heads)
        or head_dim % (2 * _STEP)
        or heads.stride()[1:] != (head_dim, 1)
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    output = heads.new_empty(heads.shape)
    rotate = library.remuda_rotate_pairs if interleaved else library.remuda_rotate_halves
    rotate(
        heads.data_ptr(),
        heads.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        output.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
    )
    return output


def _rotate_on_gpu(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    from engine.kernels.triton.rotate_and_write import Angles, rotate

    return rotate(heads, Angles(cos, sin, interleaved))


def _is_bfloat16_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" and tensor.numel() > 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = tile_library()
    if library is None:
        return None
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    library.remuda_rms_norm.argtypes = (pointer, pointer, pointer, number, number, ctypes.c_float)
    library.remuda_add_rms_norm.argtypes = (pointer, pointer, pointer, pointer, number, number, ctypes.c_float)
    library.remuda_silu_multiply.argtypes = [pointer] * 2 + [number] * 2
    library.remuda_rotate_halves.argtypes = [pointer, number] + [pointer] * 3 + [number] * 3
    library.remuda_rotate_pairs.argtypes = library.remuda_rotate_halves.argtypes
    for name in ("rms_norm", "add_rms_norm", "silu_multiply", "rotate_halves", "rotate_pairs"):
        getattr(library, f"remuda_{name}").restype = None
    return library
