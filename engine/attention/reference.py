"""Attention in plain PyTorch on gathered pages; runs on any device and is what other backends are compared with.

T tokens of a step, D decoding requests, L positions, h heads, k KV heads, d head_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from engine.attention.backend import KvCacheView, Rotation
from engine.attention.pieces import attend_in_pieces
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig

_MAX_GATHERED_POSITIONS = 32768
"""Bound on D × L of one batched decode, so that scratch memory does not grow with requests times context."""
_MAX_TILE_QUERIES = 512
"""Bound on the queries of one prefill tile, for the same reason."""


@dataclass(frozen=True)
class _DecodeTile:
    """Requests with one token in this step. ``rows`` [D] of T; ``slots`` and ``mask`` [D, L]: where each visible
    position's key is in the pool, and whether there is one. Absent ones point at the null block, which is always zero,
    so that what another request left in a block (NaN, say) never enters a sum."""

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PrefillTile:
    """Neighbouring tokens of one request and chunk: rows [start, stop) of T. ``slots`` [L]: where the keys lie that
    they see, the last of them their own. The mask is made when it is needed: all tiles' together could be large."""

    start: int
    stop: int
    slots: torch.Tensor
    window_size: int | None

    def mask(self) -> torch.Tensor:
        """[n, L], n = stop - start: which token sees which key."""
        keys = torch.arange(len(self.slots), device=self.slots.device)
        queries = keys[len(self.slots) - (self.stop - self.start) :, None]
        mask = keys <= queries
        return mask if self.window_size is None else mask & (keys > queries - self.window_size)


@dataclass
class _GroupPlan:
    """One KV group's share: where new keys go, and the tiles to compute."""

    slot_mapping: torch.Tensor
    decodes: list[_DecodeTile] = field(default_factory=list)
    prefills: list[PrefillTile] = field(default_factory=list)


class ReferenceStepAttention:
    """A planned step; see StepAttention."""

    def __init__(self, plans: list[_GroupPlan], places: dict[int, tuple[int, int]]) -> None:
        self._plans = plans
        self._places = places

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
        plan = self._plans[group]
        keys, values = kv_cache.key_cache[slot].flatten(0, 1), kv_cache.value_cache[slot].flatten(0, 1)
        keys.index_copy_(0, plan.slot_mapping, key)
        values.index_copy_(0, plan.slot_mapping, value)
        output = torch.empty_like(query)
        for decode in plan.decodes:
            output[decode.rows] = _decode(query[decode.rows], keys, values, decode)
        for prefill in plan.prefills:
            rows = slice(prefill.start, prefill.stop)
            output[rows] = attend_prefill(query[rows], keys, values, prefill)
        return output


class ReferenceAttention:
    """Batches decoding requests by padding, takes prefill chunks tile by tile; see AttentionBackend."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> ReferenceStepAttention:
        places = {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}
        plans = [_plan_group(batch, g, group, block_size) for g, group in enumerate(groups)]
        return ReferenceStepAttention(plans, places)


def _decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: _DecodeTile) -> torch.Tensor:
    """[D, h, d] queries. A KV head's query heads stand as its queries, so that no key is repeated."""
    num_kv_heads = keys.shape[1]
    grouped = query.unflatten(1, (num_kv_heads, -1))
    # [D, L, k, d] seen as [D, k, L, d]. index_select copies at memory speed, plain indexing does not.
    shape = (*tile.slots.shape, *keys.shape[1:])
    gathered_keys = keys.index_select(0, tile.slots.flatten()).view(shape).transpose(1, 2)
    gathered_values = values.index_select(0, tile.slots.flatten()).view(shape).transpose(1, 2)
    mask = tile.mask[:, None, None, :].expand(-1, 1, grouped.shape[2], -1)
    attended = functional.scaled_dot_product_attention(grouped, gathered_keys, gathered_values, attn_mask=mask)
    return attended.flatten(1, 2)


def attend_prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: PrefillTile) -> torch.Tensor:
    """[n, h, d] queries. KV heads are the batch, and each one's query heads share its keys without a copy."""
    if query.device.type == "cpu" and tile.window_size is None:
        return attend_in_pieces(query, keys, values, tile.slots)
    num_kv_heads = keys.shape[1]
    grouped = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    shape = (-1, grouped.shape[1], -1, -1)
    gathered_keys = keys.index_select(0, tile.slots).transpose(0, 1)[:, None].expand(shape)
    gathered_values = values.index_select(0, tile.slots).transpose(0, 1)[:, None].expand(shape)
    attended = functional.scaled_dot_product_attention(
        grouped, gathered_keys, gathered_values, attn_mask=tile.mask()[None, None]
    )
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _plan_group(batch: ForwardBatch, group: int, config: KvGroupConfig, block_size: int) -> _GroupPlan:
    plan = _GroupPlan(batch.slot_mapping[group])
    tables = batch.block_tables[group]
    decodes: list[tuple[int, int, int, int]] = []
    row = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        if query_len == 1:
            first = config.first_visible(kv_len - 1)
            decodes.append((kv_len - first, row, request, first))
        else:
            plan.prefills.extend(prefill_tiles(tables[request], row, kv_len - query_len, kv_len, config, block_size))
        row += query_len
    for members in _decode_batches(sorted(decodes)):
        plan.decodes.append(_decode_tile(tables, members, block_size))
    return plan


def prefill_tiles(
    table: torch.Tensor, row: int, start: int, stop: int, config: KvGroupConfig, block_size: int
) -> Iterator[PrefillTile]:
    """Cut positions [start, stop) of one request at the borders of chunks and into tiles of bounded size."""
    device = table.device
    for tile_start, tile_stop in _tile_bounds(start, stop, config.chunk_size):
        positions = torch.arange(config.first_visible(tile_start), tile_stop, device=device)
        slots = table[positions // block_size] * block_size + positions % block_size
        offset = row - start
        yield PrefillTile(tile_start + offset, tile_stop + offset, slots, config.window_size)


def _tile_bounds(start: int, stop: int, chunk_size: int | None) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = min(stop, start + _MAX_TILE_QUERIES)
        if chunk_size:
            end = min(end, (start // chunk_size + 1) * chunk_size)
        yield start, end
        start = end


def _decode_batches(decodes: list[tuple[int, int, int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Divide decodes, sorted by length, into batches of bounded padded size."""
    batch: list[tuple[int, int, int, int]] = []
    for decode in decodes:
        if batch and (len(batch) + 1) * decode[0] > _MAX_GATHERED_POSITIONS:
            yield batch
            batch = []
        batch.append(decode)
    if batch:
        yield batch


def _decode_tile(tables: torch.Tensor, members: list[tuple[int, int, int, int]], block_size: int) -> _DecodeTile:
    """``members``: (visible length, row of T, request, first visible position) of each, shortest first."""
    lengths, rows, requests, firsts = torch.tensor(members, device=tables.device).unbind(1)
    offsets = torch.arange(members[-1][0], device=tables.device)
    mask = offsets[None, :] < lengths[:, None]
    positions = firsts[:, None] + offsets[None, :]
    # Positions past the end may lie past the table; they are masked, and read the null block's first entry instead.
    columns = (positions // block_size).masked_fill(~mask, 0)
    blocks = tables[requests].gather(1, columns)
    slots = (blocks * block_size + positions % block_size).masked_fill(~mask, 0)
    return _DecodeTile(rows, slots, mask)
