"""The KV pool's tensors on one rank."""

from collections.abc import Sequence

import torch

from engine.attention.backend import KvCacheView
from engine.config import Dtype, ParallelConfig
from engine.dtypes import torch_dtype
from engine.model_config import ModelConfig, kv_groups, num_local_kv_heads


def allocate_kv_cache(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: Dtype,
    device: torch.device,
) -> KvCacheView:
    """All blocks zero, so that block 0 is. On CPU the pages become real only when they are written."""
    shape = (num_blocks, block_size, num_local_kv_heads(config, parallel), config.head_dim)
    num_layer_slots = len(kv_groups(config)[0].layers)

    def pool() -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=torch_dtype(dtype), device=device) for _ in range(num_layer_slots))

    return KvCacheView(pool(), pool())


def copy_blocks(cache: KvCacheView, pairs: Sequence[tuple[int, int]]) -> None:
    """``pairs`` of (source, destination) block ids. All sources are read before any destination is written."""
    if not pairs:
        return
    sources, destinations = (list(ids) for ids in zip(*pairs, strict=True))
    for tensor in (*cache.key_cache, *cache.value_cache):
        tensor[destinations] = tensor[sources]
