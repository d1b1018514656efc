"""Attention of which each token's result is its own alone: the same whether the token stands in a prompt, in a piece of
one or decodes, whatever else is in the step, and wherever its heads stand among the rank's. For deterministic mode
(docs/determinism.md) where there are no tile units; arithmetic is float32, in plain torch.

Positions are taken in chunks that begin at multiples of 128, one after another, with a running maximum and sum (online
softmax, arXiv 1805.02867). A chunk in which a token sees nothing changes none of its numbers, and products are of one
shape whatever the step is.

D requests of n tokens each, h query heads, k KV heads, d head_dim, C positions of a chunk.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.attention.backend import KvCacheView, Rotation
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.kernels.fixed_linear import gpu_fixed_linears

_CHUNK = 128
_ROWS = 16
"""Of one product: query heads, of one or several tokens, that share a KV head."""
_MAX_TOKENS = 256
"""Of a tile, all its requests together, so that scratch memory is bounded."""
_LOWEST = -1e30


@dataclass(frozen=True)
class _Tile:
    """D requests with n neighbouring tokens each. ``rows`` [D, n] of T; ``positions`` [D, n]; ``tables`` [D, blocks].
    Keys at positions [first, last) are seen by some token; ``firsts`` [D, n]: from where each token sees."""

    rows: torch.Tensor
    positions: torch.Tensor
    firsts: torch.Tensor
    tables: torch.Tensor
    first: int
    last: int


class FixedStepAttention:
    """A planned step; see StepAttention."""

    def __init__(
        self, batch: ForwardBatch, tiles: list[list[_Tile]], places: dict[int, tuple[int, int]], block_size: int
    ) -> None:
        self._slot_mapping = batch.slot_mapping
        self._tiles = tiles
        self._places = places
        self._block_size = block_size

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KvCacheView,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        if rotation is not None:
            query, key = rotation.apply(query), rotation.apply(key)
        group, slot = self._places[layer]
        keys, values = kv_cache.key_cache[slot].flatten(0, 1), kv_cache.value_cache[slot].flatten(0, 1)
        keys.index_copy_(0, self._slot_mapping[group], key)
        values.index_copy_(0, self._slot_mapping[group], value)
        output = torch.empty_like(query)
        for tile in self._tiles[group]:
            output[tile.rows] = _attend(query[tile.rows], keys, values, tile, self._block_size).to(query.dtype)
        return output


class FixedAttention:
    """See AttentionBackend."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> FixedStepAttention:
        places = {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}
        tiles = [list(_tiles(batch, g, group)) for g, group in enumerate(groups)]
        return FixedStepAttention(batch, tiles, places, block_size)


def _tiles(batch: ForwardBatch, group: int, config: KvGroupConfig) -> Iterator[_Tile]:
    """Requests that decode go together, prompts in pieces by themselves."""
    decodes: list[tuple[int, int, int]] = []
    row = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        start = kv_len - query_len
        if query_len == 1:
            decodes.append((request, row, start))
        else:
            for done in range(0, query_len, _MAX_TOKENS):
                count = min(_MAX_TOKENS, query_len - done)
                yield _tile(batch, group, config, [(request, row + done, start + done)], count)
        row += query_len
    for done in range(0, len(decodes), _MAX_TOKENS):
        yield _tile(batch, group, config, decodes[done : done + _MAX_TOKENS], 1)


def _tile(
    batch: ForwardBatch, group: int, config: KvGroupConfig, members: list[tuple[int, int, int]], count: int
) -> _Tile:
    """``members``: (request, first row of T, first position) of each."""
    device = batch.positions.device
    requests, rows, starts = torch.tensor(members, device=device).unbind(1)
    offsets = torch.arange(count, device=device)
    positions = starts[:, None] + offsets
    firsts = [[config.first_visible(start + i) for i in range(count)] for _, _, start in members]
    last = max(start for _, _, start in members) + count
    return _Tile(
        rows[:, None] + offsets,
        positions,
        torch.tensor(firsts, device=device),
        batch.block_tables[group][requests],
        min(map(min, firsts)),
        last,
    )


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: _Tile, block_size: int
) -> torch.Tensor:
    """[D, n, h, d] queries; ``keys``, ``values`` [slots, k, d]. Returns float32 [D, n, h, d]."""
    num_requests, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    per_kv = num_heads // num_kv_heads
    # A KV head's query heads, token by token: [D, k, n × h / k, d], filled up to whole products.
    rows = query.float().mul_(1 / math.sqrt(head_dim)).unflatten(2, (num_kv_heads, per_kv)).permute(0, 2, 1, 3, 4)
    rows = rows.reshape(num_requests, num_kv_heads, num_tokens * per_kv, head_dim)
    rows = functional.pad(rows, (0, 0, 0, -rows.shape[2] % _ROWS))
    seen_from, seen_to = (_by_row(bound, per_kv, rows.shape[2]) for bound in (tile.firsts, tile.positions))
    highest = rows.new_full((*rows.shape[:3], 1), _LOWEST)
    total, sums = torch.zeros_like(highest), torch.zeros_like(rows)
    for start in range(tile.first // _CHUNK * _CHUNK, tile.last, _CHUNK):
        positions = torch.arange(start, start + _CHUNK, device=query.device)
        slots = _slots(tile, positions, block_size)
        chunk_keys, chunk_values = (
            pool.index_select(0, slots.flatten()).float().unflatten(0, slots.shape).transpose(1, 2)
            for pool in (keys, values)
        )  # [D, k, C, d]
        is_seen = (positions >= seen_from[:, None, :, None]) & (positions <= seen_to[:, None, :, None])
        scores = _products(rows, chunk_keys.transpose(2, 3)).masked_fill_(~is_seen, -math.inf)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(new_highest).exp_()
        shrink = (highest - new_highest).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        sums = sums * shrink + _products(weights, chunk_values)
        highest = new_highest
    attended: torch.Tensor = (sums / total)[:, :, : num_tokens * per_kv]
    attended = attended.unflatten(2, (num_tokens, per_kv)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return attended


def _by_row(bounds: torch.Tensor, per_kv: int, num_rows: int) -> torch.Tensor:
    """[D, n] of tokens to [D, rows]; rows that fill up see what the last token sees."""
    by_row = bounds.repeat_interleave(per_kv, dim=1)
    return torch.cat((by_row, by_row[:, -1:].expand(-1, num_rows - by_row.shape[1])), dim=1)


def _slots(tile: _Tile, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """[D, C]: where the positions' keys lie. What no token of a request sees is read from the null block, which is
    always zero: elsewhere anything may stand."""
    is_there = (positions >= tile.firsts[:, :1]) & (positions <= tile.positions[:, -1:])
    columns = (positions // block_size).expand_as(is_there).masked_fill(~is_there, 0)
    slots = tile.tables.gather(1, columns) * block_size + positions % block_size
    chosen: torch.Tensor = slots.masked_fill(~is_there, 0)
    return chosen


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[D, k, rows, a] by [D, k, a, b], as products of [16, a] by [a, b]."""
    if left.is_cuda:
        products = gpu_fixed_linears(left.flatten(0, 1), right.flatten(0, 1).transpose(1, 2))
        return products.view(*left.shape[:3], -1)
    blocks = left.unflatten(2, (-1, _ROWS))
    num_blocks = blocks.shape[2]
    repeated = right[:, :, None].expand(-1, -1, num_blocks, -1, -1)
    product = torch.bmm(blocks.flatten(0, 2), repeated.reshape(-1, *right.shape[2:]))
    return product.view(*left.shape[:3], right.shape[-1])
