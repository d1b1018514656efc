"""Attention of decoding requests on the paged cache, read in place.

A request's visible positions are divided among several programs, whose partial sums are then combined
("Flash-Decoding", Dao et al. 2023; the softmax is the online one of FlashAttention, arXiv 2205.14135). A program takes
all query heads of one key-value head together, so that each key is read once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.triton.launch import cdiv, dot_dtype, power_of_2

_POSITIONS = 64
"""Keys that a program multiplies at once."""
_LEAST_ROWS = 16
"""tl.dot takes no fewer."""
_LEAST_POSITIONS = 256
"""Of one part of a request: shorter ones cost more to combine than they save."""
_PROGRAMS_PER_PROCESSOR = 4
_MOST_PARTS = 64
_LOG2_E = 1.4426950408889634


def num_parts(num_requests: int, num_kv_heads: int, most_positions: int, num_processors: int) -> int:
    """Into how many parts each request is divided: enough to keep all multiprocessors busy, none too short.

    Args:
        most_positions: that any request may see. Requests with fewer divide those among the same number of parts.
    """
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * num_processors, max(1, num_requests * num_kv_heads))
    return max(1, min(wanted, cdiv(most_positions, _LEAST_POSITIONS), _MOST_PARTS))


def decode_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    requests: torch.Tensor,
    *,
    chunk_size: int | None = None,
    window_size: int | None = None,
    parts: int = 1,
) -> None:
    """Fill rows of ``output`` with softmax(q · k / √d) · v, sums in float32. D requests with one token each.

    A token at position p sees positions up to p: all of them, those of its chunk of ``chunk_size``, or the last
    ``window_size``.

    Args:
        query, output: [T, h, d], contiguous; bfloat16 or float32, as the cache.
        key_cache, value_cache: [blocks, block_size, k, d], contiguous; k divides h.
        block_tables: [B, n] int64, contiguous.
        positions: [T] int64.
        rows, requests: [D] int64, each token's row in T and its request's in B.
        parts: see ``num_parts``.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_heads, num_requests = query.shape[1], len(rows)
    assert query.is_contiguous() and output.is_contiguous() and block_tables.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and num_heads % num_kv_heads == 0
    if num_requests == 0:
        return
    sums = torch.empty(num_requests, num_heads, parts, head_dim, dtype=torch.float32, device=query.device)
    weights = torch.empty(num_requests, num_heads, parts, dtype=torch.float32, device=query.device)
    shape = {
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": power_of_2(head_dim, _LEAST_ROWS),
        "PARTS": parts,
        "num_warps": 4,
    }
    inputs = (query, key_cache, value_cache, block_tables, positions, rows, requests)
    _attend_part[(num_requests, num_kv_heads, parts)](
        *inputs,
        sums,
        weights,
        block_tables.shape[1],
        head_dim**-0.5 * _LOG2_E,
        BLOCK_SIZE=block_size,
        CHUNK=chunk_size or 0,
        WINDOW=window_size or 0,
        GROUP=num_heads // num_kv_heads,
        GROUP_ROWS=power_of_2(num_heads // num_kv_heads, _LEAST_ROWS),
        POSITIONS=_POSITIONS,
        DOT=dot_dtype(query.dtype),
        num_stages=2,
        **shape,
    )
    _combine_parts[(num_requests, num_heads)](sums, weights, rows, output, PARTS_ROWS=power_of_2(parts), **shape)


@triton.jit
def _seen_by(
    stop: tl.tensor,
    part: tl.tensor,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
) -> Any:
    """First position of a part, and the one after its last, of what the token at ``stop`` − 1 sees."""
    start = 0
    if CHUNK:
        start = (stop - 1) // CHUNK * CHUNK
    if WINDOW:
        start = tl.maximum(stop - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(stop - start, PARTS), POSITIONS) * POSITIONS
    begin = start + part * share
    return begin, tl.minimum(begin + share, stop)


@triton.jit
def _attend_tile(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    is_seen: tl.tensor,
    scale: tl.tensor,
    largest: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    DOT: tl.constexpr,
) -> Any:
    """The online softmax's state after one more tile of keys and values."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(is_seen[None, :], scores, float("-inf"))
    # The first position of a part is always seen, so the maximum is finite.
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    decay = tl.exp2(largest - larger)
    powers = tl.exp2(scores - larger[:, None])
    weight = weight * decay + tl.sum(powers, axis=1)
    total = total * decay[:, None] + tl.dot(powers.to(DOT), v, input_precision="ieee")
    return larger, weight, total


@triton.jit
def _attend_part(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    requests: tl.tensor,
    sums: tl.tensor,
    weights: tl.tensor,
    table_width: tl.tensor,
    scale: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """``scale``: on scores, with log2(e): powers of two are what the hardware takes. ``sums`` [D, h, PARTS, d] are
    divided by their weights already, of which ``weights`` [D, h, PARTS] holds the binary logarithm."""
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + request)
    table = block_tables + tl.load(requests + request) * table_width
    stop = (tl.load(positions + row) + 1).to(tl.int32)
    begin, end = _seen_by(stop, part, CHUNK, WINDOW, PARTS, POSITIONS)
    members = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, WIDTH)
    heads = kv_head * GROUP + members
    is_member = members < GROUP
    own = (row * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + own, mask=is_member[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    q = q.to(tl.float32).to(DOT)

    largest = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_ROWS], tl.float32)
    total = tl.zeros([GROUP_ROWS, WIDTH], tl.float32)
    for first in range(begin, end, POSITIONS):
        seen = first + tl.arange(0, POSITIONS)
        is_seen = seen < end
        block = tl.load(table + seen // BLOCK_SIZE, mask=is_seen, other=0)
        place = (block * BLOCK_SIZE + seen % BLOCK_SIZE) * (HEADS // GROUP) + kv_head
        offsets = place[:, None] * HEAD_DIM + dims[None, :]
        mask = is_seen[:, None] & (dims[None, :] < HEAD_DIM)
        k = tl.load(key_cache + offsets, mask=mask, other=0.0).to(tl.float32).to(DOT)
        v = tl.load(value_cache + offsets, mask=mask, other=0.0).to(tl.float32).to(DOT)
        largest, weight, total = _attend_tile(q, k, v, is_seen, scale, largest, weight, total, DOT)

    is_empty = begin >= end
    places = ((request * HEADS + heads) * PARTS + part).to(tl.int64)
    logarithm = tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, weight)))
    tl.store(weights + places, logarithm, mask=is_member)
    total = total / tl.where(is_empty, 1.0, weight)[:, None]
    mask = is_member[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(sums + places[:, None] * HEAD_DIM + dims[None, :], total, mask=mask)


@triton.jit
def _combine_parts(
    sums: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    output: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_ROWS: tl.constexpr,
) -> None:
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.arange(0, PARTS_ROWS)
    dims = tl.arange(0, WIDTH)
    places = (request * HEADS + head) * PARTS + parts
    logarithms = tl.load(weights + places, mask=parts < PARTS, other=float("-inf"))
    powers = tl.exp2(logarithms - tl.max(logarithms, axis=0))
    mask = (parts[:, None] < PARTS) & (dims[None, :] < HEAD_DIM)
    values = tl.load(sums + places[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    combined = tl.sum(values * powers[:, None], axis=0) / tl.sum(powers, axis=0)
    place = output + (tl.load(rows + request) * HEADS + head) * HEAD_DIM + dims
    tl.store(place, combined.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
