"""Matrix products by weights as they lie in the checkpoint.

On a CPU with tile units (AMX) few tokens take one pass over the weights at nearly the speed of reading them, and a few
hundred less time than with oneDNN (docs/performance.md). A token's result, among so many, is its own alone.
"""

import ctypes
import functools

import torch
from torch.nn import functional

from engine.kernels.native_library import tile_library

MOST_TOKENS = 512
"""Above, oneDNN's product of bfloat16 is faster or about as fast."""
_ROWS = 32
"""Outputs that the kernel computes together; also the inputs of bfloat16 in one step of it. Of int8 it takes 64."""
_INT8_INPUTS = 64


def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden`` [..., in] times the transpose of ``weight`` [out, in], with float32 sums: [..., out]."""
    num_outputs, num_inputs = weight.shape
    num_tokens = hidden.numel() // num_inputs
    library = _tile_library()
    if (
        library is None
        or hidden.dtype is not torch.bfloat16
        or not hidden.is_cpu
        or num_tokens > MOST_TOKENS
        or not _is_plain(weight, torch.bfloat16)
        or num_inputs % _ROWS
        or num_outputs % _ROWS
    ):
        return functional.linear(hidden, weight)
    return tile_linear(hidden, weight)


def tile_linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As ``linear`` in bfloat16, by the tile units however many tokens there are. Only where ``has_tiles`` says so;
    both sizes of ``weight``, which is contiguous, are multiples of 32."""
    library = _tile_library()
    assert library is not None
    num_outputs, num_inputs = weight.shape
    hidden = hidden.contiguous()
    output = hidden.new_empty(*hidden.shape[:-1], num_outputs)
    library.remuda_linear_bf16(
        weight.data_ptr(),
        hidden.data_ptr(),
        output.data_ptr(),
        hidden.numel() // num_inputs,
        num_inputs,
        num_outputs,
    )
    return output


def can_multiply_int8(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``linear_int8`` takes ``weight`` [out, in] int8, with activations of ``dtype``."""
    num_outputs, num_inputs = weight.shape
    return (
        dtype is torch.bfloat16
        and _is_plain(weight, torch.int8)
        and num_inputs % _INT8_INPUTS == 0
        and num_outputs % _ROWS == 0
        and _tile_library() is not None
    )


def linear_int8(hidden: torch.Tensor, weight: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
    """``hidden`` [..., in] bfloat16 times the transpose of ``weight`` [out, in] int8 × ``row_scales`` [out] float32:
    [..., out] bfloat16.

    Each token is rounded to int8 by its own largest magnitude ÷ 127; the products are added up exactly. Only where
    ``can_multiply_int8`` says so.
    """
    library = _tile_library()
    assert library is not None
    num_outputs, num_inputs = weight.shape
    hidden = hidden.contiguous()
    output = hidden.new_empty(*hidden.shape[:-1], num_outputs)
    library.remuda_linear_int8(
        weight.data_ptr(),
        row_scales.data_ptr(),
        hidden.data_ptr(),
        output.data_ptr(),
        hidden.numel() // num_inputs,
        num_inputs,
        num_outputs,
    )
    return output


def has_tiles() -> bool:
    """Whether the library was built and the CPU has tile units."""
    return _tile_library() is not None


def _is_plain(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype is dtype and weight.is_cpu and weight.is_contiguous()


@functools.cache
def _tile_library() -> ctypes.CDLL | None:
    """None where the library was not built or the CPU has no tile units."""
    library = tile_library()
    if library is None:
        return None
    library.remuda_linear_bf16.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    library.remuda_linear_bf16.restype = None
    library.remuda_linear_int8.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    library.remuda_linear_int8.restype = None
    return library
