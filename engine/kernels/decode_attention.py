"""Attention of decoding requests on the CPU's tile units, reading the paged cache in place."""

import ctypes
import functools
from dataclasses import dataclass

import torch

from engine.kernels.native_library import tile_library

_HEADS_STEP = 16
"""Most query heads that may share a key-value head; positions of a block come in multiples of it."""
_HEAD_DIM_STEP = 32


@dataclass(frozen=True)
class DecodeRequests:
    """D requests with one token each, all [D] int64 and contiguous.

    rows: the token's row among the step's tokens. tables: the request's row in the block tables. firsts, lasts: it sees
    positions firsts … lasts − 1.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    firsts: torch.Tensor
    lasts: torch.Tensor


def can_attend(query: torch.Tensor, key_cache: torch.Tensor, *, only_prompts: bool = False) -> bool:
    """Whether ``decode_attention`` takes queries [T, heads, head_dim] and a cache [blocks, block_size, kv_heads, d].

    ``only_prompts``: whether ``prompt_attention`` does, which any number of heads may ask.
    """
    library = _library()
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    return (
        library is not None
        and query.dtype is torch.bfloat16
        and key_cache.dtype is torch.bfloat16
        and query.device.type == "cpu"
        and key_cache.is_contiguous()
        and block_size % _HEADS_STEP == 0
        and head_dim % _HEAD_DIM_STEP == 0
        and head_dim <= library.remuda_attention_max_head_dim()
        and (only_prompts or query.shape[1] <= _HEADS_STEP * num_kv_heads)
    )


def decode_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    requests: DecodeRequests,
) -> None:
    """Fill the requests' rows of ``output`` [T, heads, head_dim] with softmax(q · k / √d) · v. Only where
    ``can_attend`` says so; ``block_tables`` [B, blocks] int64 is contiguous."""
    library = _library()
    assert library is not None and query.is_contiguous() and output.is_contiguous() and block_tables.is_contiguous()
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    library.remuda_decode_attention(
        query.data_ptr(),
        output.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        requests.rows.data_ptr(),
        requests.tables.data_ptr(),
        requests.firsts.data_ptr(),
        requests.lasts.data_ptr(),
        len(requests.rows),
        block_size,
        num_kv_heads,
        query.shape[1] // num_kv_heads,
        head_dim,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where the library was not built or the CPU has no tile units."""
    library = tile_library()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.remuda_decode_attention.argtypes = [pointer] * 5 + [number] + [pointer] * 4 + [number] * 5
    library.remuda_decode_attention.restype = None
    return library
