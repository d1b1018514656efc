"""Matrix products by weights in a quantized format, for CPUs with tile units (AMX).

Weights are decoded piece by piece in the CPU's cache, so that memory is read at what they take there. The result of a
token, among up to 128, does not depend on the tokens beside it.
"""

import ctypes
import functools
from dataclasses import dataclass
from enum import IntEnum

import torch

from engine.kernels.linear import linear
from engine.kernels.native_library import tile_library

_UNIT = 32
"""Weights of a row that are decoded together, and rows that are multiplied together."""
_MOST_TOKENS = 128
"""Above, it is faster to decode rows and then multiply them as bfloat16."""
_TOKEN_BLOCK = 16
_TILE_BYTES = 2**23
"""Of rows that are decoded for that, at once."""


class Encoding(IntEnum):
    """How a row's weights stand in its bytes; the numbers are the library's (kFormats in native/encoded_linear.cpp)."""

    FLOAT8 = 0
    """e4m3 numbers, finite, without scales."""
    SCALED_FLOAT8 = 1
    """The same with float32 scales."""
    INT8 = 2
    """Without scales."""
    INT4 = 3
    """Two codes to a byte, the first in the low half: (code − zero) · scale."""
    NF4 = 4
    """Two codes to a byte, the first in the high half; scales are float32."""
    Q4_0 = 5
    """This one and the following are ggml's blocks, which hold their scales."""
    Q8_0 = 6
    Q4_K = 7
    Q5_K = 8
    Q6_K = 9


_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix [out, in] in a quantized format.

    ``codes``: [out, bytes of a row] of one-byte numbers. ``group_size``: how many consecutive inputs form a group of
    those below, or a block. ``scales``: [rows, groups], or None. ``zeros``: [out, groups] uint8, or None for 8.
    ``rows_per_scale``: how many consecutive rows share a row of ``scales``.
    ``output_scales``: [out] float32, by which the sums are multiplied, or None.
    """

    encoding: Encoding
    num_inputs: int
    codes: torch.Tensor
    group_size: int
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    rows_per_scale: int = 1
    output_scales: torch.Tensor | None = None


class _Matrix(ctypes.Structure):
    """Encoded in native/encoded.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("output_scales", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("group_units", ctypes.c_int64),
        ("rows_per_scale", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    )


def can_decode(matrix: EncodedMatrix) -> bool:
    """Whether the functions below take ``matrix``."""
    return (
        matrix.codes.device.type == "cpu"
        and matrix.codes.shape[0] % _UNIT == matrix.num_inputs % _UNIT == matrix.group_size % _UNIT == 0
        and _library() is not None
    )


def linear_encoded(hidden: torch.Tensor, matrix: EncodedMatrix) -> torch.Tensor:
    """``hidden`` [..., in] bfloat16 times the transpose of ``matrix`` [out, in]: [..., out] bfloat16.

    Weights are rounded to bfloat16 and sums are float32. Only where ``can_decode`` says so.
    """
    library = _library()
    assert library is not None
    hidden = hidden.contiguous()
    num_tokens = hidden.numel() // matrix.num_inputs
    if num_tokens > _MOST_TOKENS:
        return _multiply_by_tiles(hidden, matrix)
    output = hidden.new_empty(*hidden.shape[:-1], matrix.codes.shape[0])
    scratch = hidden.new_empty(-(-num_tokens // _TOKEN_BLOCK) * _TOKEN_BLOCK * matrix.num_inputs)
    library.remuda_linear_encoded(
        _native_form(matrix), hidden.data_ptr(), output.data_ptr(), scratch.data_ptr(), num_tokens
    )
    return output


def _multiply_by_tiles(hidden: torch.Tensor, matrix: EncodedMatrix) -> torch.Tensor:
    num_outputs = matrix.codes.shape[0]
    output = hidden.new_empty(*hidden.shape[:-1], num_outputs)
    tile = max(_UNIT, _TILE_BYTES // (matrix.num_inputs * hidden.element_size()) // _UNIT * _UNIT)
    for first in range(0, num_outputs, tile):
        rows = slice(first, min(first + tile, num_outputs))
        output[..., rows] = linear(hidden, decode_rows(matrix, rows))
    return output if matrix.output_scales is None else output.mul_(matrix.output_scales)


def decode_rows(matrix: EncodedMatrix, rows: slice) -> torch.Tensor:
    """Consecutive rows, without ``output_scales``: [n, in] bfloat16. Only where ``can_decode`` says so."""
    library = _library()
    assert library is not None
    first, last, step = rows.indices(matrix.codes.shape[0])
    assert step == 1
    output = torch.empty(max(last - first, 0), matrix.num_inputs, dtype=torch.bfloat16)
    library.remuda_decode_rows(_native_form(matrix), first, len(output), output.data_ptr())
    return output


def _native_form(matrix: EncodedMatrix) -> _Matrix:
    codes, scales = matrix.codes, matrix.scales
    return _Matrix(
        _address(codes),
        _address(scales),
        _address(matrix.zeros),
        _address(matrix.output_scales),
        codes.shape[0],
        matrix.num_inputs,
        codes.shape[1],
        0 if scales is None else scales.shape[1],
        matrix.group_size // _UNIT,
        matrix.rows_per_scale,
        matrix.encoding,
        0 if scales is None else _SCALE_TYPES[scales.dtype],
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where the library was not built or the CPU has no tile units."""
    library = tile_library()
    if library is not None:
        pointer = ctypes.POINTER(_Matrix)
        library.remuda_linear_encoded.argtypes = [pointer, *[ctypes.c_void_p] * 3, ctypes.c_int64]
        library.remuda_linear_encoded.restype = None
        library.remuda_decode_rows.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        library.remuda_decode_rows.restype = None
    return library
