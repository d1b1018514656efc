"""Rotary embedding and the writing of keys and values to the paged cache, in one pass on CPUs with tile units."""

import ctypes
import functools
from typing import Any

import torch

from engine.kernels.native_library import tile_library

_HEAD_DIM_STEP = 32


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    interleaved: bool = False,
) -> torch.Tensor | None:
    """Turn queries and keys, and write keys and values to their slots.

    Args:
        query: [T, heads, d] bfloat16; may be a part of wider rows, as ``key`` and ``value``.
        key, value: [T, kv_heads, d].
        key_cache, value_cache: [blocks, block_size, kv_heads, d], contiguous; written in place.
        slots: [T] int64, block × block_size + offset of each token.
        angles: cosines and sines, [T, 1, d / 2] float32; None: nothing turns.
        interleaved: element 2i turns with 2i + 1; else i with i + d / 2.

    Returns:
        The queries, turned and contiguous. None where the kernel does not take its arguments: nothing is written then.
    """
    library = _library()
    num_tokens, num_heads, head_dim = query.shape
    tensors = (query, key, value, key_cache, value_cache)
    if (
        library is None
        or head_dim % _HEAD_DIM_STEP
        or not all(tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        or not all(tensor.stride()[1:] == (head_dim, 1) for tensor in tensors[:3])
        or not all(tensor.is_contiguous() for tensor in (key_cache, value_cache, slots, *(angles or ())))
    ):
        return None
    turned = torch.empty(query.shape, dtype=torch.bfloat16)
    cosines, sines = (None, None) if angles is None else (angles[0].data_ptr(), angles[1].data_ptr())
    library.remuda_rotate_and_write(
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        cosines,
        sines,
        slots.data_ptr(),
        turned.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_tokens,
        num_heads,
        key.shape[1],
        head_dim,
        interleaved,
    )
    return turned


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where the library was not built or the CPU has no tile units."""
    library = tile_library()
    if library is None:
        return None
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    library.remuda_rotate_and_write.argtypes = [pointer, number] * 3 + [pointer] * 6 + [number] * 5
    library.remuda_rotate_and_write.restype = None
    return library
