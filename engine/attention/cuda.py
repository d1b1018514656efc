"""Attention on CUDA devices: decoding requests by a Triton kernel that reads the paged cache in place, prompts by
torch's fused attention (FlashAttention-2, arXiv 2307.08691, or cuDNN's) on gathered keys. Nothing waits for the device.

T tokens of a step, D decoding requests, h heads, k KV heads, d head_dim.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import KvCacheView, Rotation
from engine.attention.cuda_prefill import PrefillShare, attend_share, prefill_shares
from engine.batch import ForwardBatch
from engine.config import KvGroupConfig
from engine.kernels.host_copy import to_device
from engine.kernels.triton.decode_attention import decode_attention, num_parts
from engine.kernels.triton.rotate_and_write import Angles, rotate_and_write


@dataclass(frozen=True)
class _Decodes:
    """``rows`` and ``requests``: [D] int64, a token's row in T and its request's in the block tables. ``longest``: most
    positions that any of them sees, one number for each KV group."""

    rows: torch.Tensor
    requests: torch.Tensor
    longest: tuple[int, ...]


@dataclass(frozen=True)
class _GroupPlan:
    """One KV group's share of a step."""

    config: KvGroupConfig
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    prefills: list[PrefillShare]
    longest_decode: int


class CudaStepAttention:
    """A planned step; see StepAttention."""

    def __init__(
        self,
        plans: list[_GroupPlan],
        places: dict[int, tuple[int, int]],
        positions: torch.Tensor,
        decodes: _Decodes | None,
    ) -> None:
        self._plans = plans
        self._places = places
        self._positions = positions
        self._decodes = decodes

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KvCacheView,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        group, slot = self._places[layer]
        plan = self._plans[group]
        key_cache, value_cache = kv_cache.key_cache[slot], kv_cache.value_cache[slot]
        angles = None if rotation is None else Angles(rotation.cos, rotation.sin, rotation.interleaved)
        query = rotate_and_write(query, key, value, key_cache, value_cache, plan.slot_mapping, angles).contiguous()
        output = torch.empty_like(query)
        for share in plan.prefills:
            rows = slice(share.start, share.stop)
            output[rows] = attend_share(query[rows], key_cache.flatten(0, 1), value_cache.flatten(0, 1), share)
        if self._decodes is not None:
            decode_attention(
                query,
                output,
                key_cache,
                value_cache,
                plan.block_tables,
                self._positions,
                self._decodes.rows,
                self._decodes.requests,
                chunk_size=plan.config.chunk_size,
                window_size=plan.config.window_size,
                parts=num_parts(
                    len(self._decodes.rows), key_cache.shape[2], plan.longest_decode, _num_processors(query.device)
                ),
            )
        return output


class CudaAttention:
    """See AttentionBackend. A step in which every request has one token launches the same kernels on the same shapes
    whatever the requests' lengths, up to the lengths that it was planned for: it can be captured as a graph."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> CudaStepAttention:
        places = {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}
        decodes = _decodes(batch, groups)
        plans = []
        for g, group in enumerate(groups):
            tables = batch.block_tables[g].contiguous()
            prefills = prefill_shares(batch, tables, group, block_size)
            longest = 0 if decodes is None else decodes.longest[g]
            plans.append(_GroupPlan(group, batch.slot_mapping[g].contiguous(), tables, prefills, longest))
        return CudaStepAttention(plans, places, batch.positions, decodes)


def _decodes(batch: ForwardBatch, groups: Sequence[KvGroupConfig]) -> _Decodes | None:
    requests = [request for request, query_len in enumerate(batch.query_lens) if query_len == 1]
    if not requests:
        return None
    most = max(batch.kv_lens[request] for request in requests)
    longest = tuple(min(most, group.chunk_size or group.window_size or most) for group in groups)
    device = batch.positions.device
    if len(requests) == len(batch.query_lens):
        both = torch.arange(len(requests), device=device)
        return _Decodes(both, both, longest)
    rows = np.cumsum(batch.query_lens)[requests] - 1
    found = to_device(np.stack((rows, np.array(requests))).astype(np.int64), device)
    return _Decodes(found[0], found[1], longest)


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
