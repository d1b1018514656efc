"""Attention of a prompt's chunk by torch's fused kernels, which need no mask in memory where attention is causal.

A request's chunk is cut at the borders of attention chunks, so that all tokens of a share see keys from the same
position on: attention is then causal, aligned with the end of the keys. Only a sliding window, and float32, for which
torch has no such kernel, need masks; there queries come in tiles, so that no mask is large. n tokens of a share, L keys
that they see, k KV heads, g query heads of each, d head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from engine.batch import ForwardBatch
from engine.config import KvGroupConfig

_TILE_QUERIES = 512
"""Of tiles with a mask: at most so many rows of it."""


@dataclass(frozen=True)
class PrefillShare:
    """Neighbouring tokens of one request and chunk: rows [start, stop) of the step's. ``slots`` [L]: where the keys lie
    that they see, the last of them their own."""

    start: int
    stop: int
    slots: torch.Tensor
    window_size: int | None


def prefill_shares(
    batch: ForwardBatch, tables: torch.Tensor, config: KvGroupConfig, block_size: int
) -> list[PrefillShare]:
    """Of all requests with several tokens in this step. ``tables``: [B, blocks] int64."""
    shares: list[PrefillShare] = []
    row = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        if query_len > 1:
            first = kv_len - query_len
            for start, stop in _cut(first, kv_len, config.chunk_size):
                positions = torch.arange(config.first_visible(start), stop, device=tables.device)
                slots = tables[request][positions // block_size] * block_size + positions % block_size
                shares.append(PrefillShare(row + start - first, row + stop - first, slots, config.window_size))
        row += query_len
    return shares


def attend_share(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, share: PrefillShare) -> torch.Tensor:
    """[n, h, d] queries on the pool's keys and values [all slots, k, d]: [n, h, d]."""
    num_queries, num_keys = len(query), len(share.slots)
    grouped = query.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
    seen_keys, seen_values = (pool.index_select(0, share.slots).transpose(0, 1) for pool in (keys, values))
    has_mask = share.window_size is not None and num_keys > share.window_size
    if not has_mask and query.dtype is torch.bfloat16:
        return _attend(grouped, seen_keys, seen_values, causal_lower_right(num_queries, num_keys))
    outputs = []
    for start in range(0, num_queries, _TILE_QUERIES):
        stop = min(start + _TILE_QUERIES, num_queries)
        last = num_keys - num_queries + stop
        first = 0 if share.window_size is None else max(0, num_keys - num_queries + start - share.window_size + 1)
        mask = _mask(stop - start, last - first, share.window_size, query.device)
        tile = grouped[:, :, start:stop]
        outputs.append(_attend(tile, seen_keys[:, first:last], seen_values[:, first:last], mask))
    return torch.cat(outputs)


def _attend(grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[k, g, n, d] queries on [k, L, d] to [n, h, d]. The KV heads are the batch: no key is copied for its queries."""
    shape = (-1, grouped.shape[1], -1, -1)
    attended = functional.scaled_dot_product_attention(
        grouped, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=mask
    )
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _mask(num_queries: int, num_keys: int, window_size: int | None, device: torch.device) -> torch.Tensor:
    """[n, L]: which query, the last of which has the last key, sees which key."""
    keys = torch.arange(num_keys, device=device)
    queries = keys[num_keys - num_queries :, None]
    mask = keys <= queries
    return mask if window_size is None else mask & (keys > queries - window_size)


def _cut(start: int, stop: int, chunk_size: int | None) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = stop if chunk_size is None else min(stop, (start // chunk_size + 1) * chunk_size)
        yield start, end
        start = end
