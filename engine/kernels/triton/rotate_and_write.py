"""Rotary position embedding (arXiv 2104.09864) of queries and keys, and the write of keys and values to the paged
cache, in one launch: a rotated key never goes to memory but to its place in the cache.

A program takes one token and a few heads, of the queries, the keys or the values.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import cdiv, power_of_2

_ELEMENTS = 2048
"""Of one program: a few heads."""


@dataclass(frozen=True)
class Angles:
    """``cos`` and ``sin``: [T, 1, d / 2] float32. ``interleaved``: 2i turns with 2i + 1, else i with i + d / 2."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


def rotate(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    """[T, h, d], turned, contiguous. bfloat16 or float32; columns of a wider matrix are read in place."""
    num_tokens, num_heads, head_dim = heads.shape
    heads = _with_whole_heads(heads)
    output = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if num_tokens:
        half, count = _tile(num_heads, head_dim)
        _rotate[(num_tokens, cdiv(num_heads, count))](
            heads,
            output,
            angles.cos.contiguous(),
            angles.sin.contiguous(),
            heads.stride(0),
            num_heads,
            HEAD_DIM=head_dim,
            INTERLEAVED=angles.interleaved,
            HEADS=count,
            HALF=half,
        )
    return output


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    angles: Angles | None,
) -> torch.Tensor:
    """Rotated queries [T, h, d], contiguous; keys, rotated, and values go to the cache. bfloat16 or float32.

    Args:
        query: [T, h, d]; key, value: [T, k, d]. Views of one [T, …] tensor are read in place.
        key_cache, value_cache: [blocks, block_size, k, d], contiguous.
        slots: [T] int64, block × block_size + offset; where negative nothing is written.
        angles: None: nothing is rotated, and ``query`` comes back as it is.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query, key, value = (_with_whole_heads(tensor) for tensor in (query, key, value))
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and slots.is_contiguous()
    if num_tokens == 0:
        return query
    half, heads = _tile(max(num_heads, num_kv_heads), head_dim)
    query_blocks = 0 if angles is None else cdiv(num_heads, heads)
    kv_blocks = cdiv(num_kv_heads, heads)
    output = query if angles is None else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    cos, sin = (slots, slots) if angles is None else (angles.cos, angles.sin)
    assert cos.is_contiguous() and sin.is_contiguous()
    _rotate_and_write[(num_tokens, query_blocks + 2 * kv_blocks)](
        query,
        key,
        value,
        output,
        key_cache,
        value_cache,
        slots,
        cos,
        sin,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        num_heads,
        num_kv_heads,
        query_blocks,
        kv_blocks,
        HEAD_DIM=head_dim,
        ROTATES=angles is not None,
        INTERLEAVED=angles is not None and angles.interleaved,
        HEADS=heads,
        HALF=half,
    )
    return output


def _tile(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Pairs of elements and heads that a program takes, powers of two."""
    half = power_of_2(head_dim) // 2
    return half, min(power_of_2(num_heads), max(1, _ELEMENTS // (2 * half)))


def _with_whole_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


@triton.jit
def _copy_heads(
    source: tl.tensor,
    destination: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first_head: tl.tensor,
    num_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """HEADS heads of one token, whose ``cos`` and ``sin`` begin there, from one place to another."""
    heads = first_head + tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    mask = (heads < num_heads) & (pairs < HEAD_DIM // 2)
    first = heads * HEAD_DIM + (2 * pairs if INTERLEAVED else pairs)
    second = first + (1 if INTERLEAVED else HEAD_DIM // 2)
    x = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
    if ROTATES:
        c = tl.load(cos + pairs, mask=pairs < HEAD_DIM // 2, other=0.0)
        s = tl.load(sin + pairs, mask=pairs < HEAD_DIM // 2, other=0.0)
        x, y = x * c - y * s, y * c + x * s
    tl.store(destination + first, x.to(destination.dtype.element_ty), mask=mask)
    tl.store(destination + second, y.to(destination.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    heads: tl.tensor,
    output: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    token_stride: tl.tensor,
    num_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    cos += token * (HEAD_DIM // 2)
    sin += token * (HEAD_DIM // 2)
    source, place = heads + token * token_stride, output + token * num_heads * HEAD_DIM
    first = tl.program_id(1) * HEADS
    _copy_heads(source, place, cos, sin, first, num_heads, HEAD_DIM, True, INTERLEAVED, HEADS, HALF)


@triton.jit
def _rotate_and_write(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    output: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    query_blocks: tl.tensor,
    kv_blocks: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos += token * (HEAD_DIM // 2)
    sin += token * (HEAD_DIM // 2)
    if block < query_blocks:
        source, place = query + token * query_stride, output + token * num_heads * HEAD_DIM
        _copy_heads(source, place, cos, sin, block * HEADS, num_heads, HEAD_DIM, ROTATES, INTERLEAVED, HEADS, HALF)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            offset = slot * num_kv_heads * HEAD_DIM
            block -= query_blocks
            if block < kv_blocks:
                source, place = key + token * key_stride, key_cache + offset
                _copy_heads(
                    source, place, cos, sin, block * HEADS, num_kv_heads, HEAD_DIM, ROTATES, INTERLEAVED, HEADS, HALF
                )
            else:
                source, place = value + token * value_stride, value_cache + offset
                first = (block - kv_blocks) * HEADS
                _copy_heads(source, place, cos, sin, first, num_kv_heads, HEAD_DIM, False, False, HEADS, HALF)
