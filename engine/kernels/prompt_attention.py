"""Attention of prompts on the CPU's tile units, reading the paged cache in place."""

import ctypes
import functools
from dataclasses import dataclass

import torch

from engine.kernels.native_library import tile_library


@dataclass(frozen=True)
class Prompts:
    """N runs of tokens, each of one request, all [N] int64 and contiguous.

    rows: the first token's row among the step's tokens. tables: the request's row in the block tables. starts: the
    first token's position. counts: tokens.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


def prompt_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    prompts: Prompts,
    *,
    chunk_size: int | None,
    window_size: int | None,
) -> None:
    """Fill the prompts' rows of ``output`` [T, heads, head_dim] with softmax(q · k / √d) · v over what each token sees:
    everything up to itself, of it only its own chunk of ``chunk_size`` positions or the last ``window_size``.

    Only where ``engine.kernels.decode_attention.can_attend`` says so; ``block_tables`` [B, blocks] int64 is contiguous.
    """
    library = _library()
    assert library is not None and query.is_contiguous() and output.is_contiguous() and block_tables.is_contiguous()
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    library.remuda_prompt_attention(
        query.data_ptr(),
        output.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        prompts.rows.data_ptr(),
        prompts.tables.data_ptr(),
        prompts.starts.data_ptr(),
        prompts.counts.data_ptr(),
        len(prompts.rows),
        chunk_size or 0,
        window_size or 0,
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
    library.remuda_prompt_attention.argtypes = [pointer] * 5 + [number] + [pointer] * 4 + [number] * 7
    library.remuda_prompt_attention.restype = None
    return library
