"""A matrix as layers that are single native calls take it (engine/kernels/native/layer_parts.h)."""

import ctypes

import torch

_ROWS = 32
_INT8_INPUTS = 64


class NativeMatrix(ctypes.Structure):
    """``weights`` [out, in] bfloat16, or int8 with ``row_scales`` [out] float32."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
    )


def native_matrix(weight: torch.Tensor, row_scales: torch.Tensor | None) -> NativeMatrix | None:
    """None where the native product does not take the matrix. Keeps its addresses, not the tensors."""
    num_outputs, num_inputs = weight.shape
    dtype, multiple = (torch.bfloat16, _ROWS) if row_scales is None else (torch.int8, _INT8_INPUTS)
    if weight.dtype is not dtype or not weight.is_cpu or not weight.is_contiguous():
        return None
    if num_inputs % multiple or num_outputs % _ROWS:
        return None
    scales = None if row_scales is None else row_scales.data_ptr()
    return NativeMatrix(weight.data_ptr(), scales, num_inputs, num_outputs)
