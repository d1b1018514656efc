"""The KV pool's tensors on one rank."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention.backend import KvCacheView
from engine.config import Dtype
from engine.dtypes import torch_dtype
from engine.kernels.host_copy import to_device
from engine.kv_groups import num_layer_slots
from engine.model_config import ModelConfig, num_local_kv_heads
from engine.parallel.mesh import Mesh


def allocate_kv_cache(
    config: ModelConfig,
    mesh: Mesh,
    *,
    num_blocks: int,
    block_size: int,
    dtype: Dtype,
    device: torch.device,
) -> KvCacheView:
    """For the layers of the rank's stage. All blocks zero, so that block 0 is. On CPU the pages become real only when
    they are written."""
    shape = (num_blocks, block_size, num_local_kv_heads(config, mesh.config), config.head_dim)
    num_slots = num_layer_slots(mesh.kv_groups(config))

    def pool() -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=torch_dtype(dtype), device=device) for _ in range(num_slots))

    return KvCacheView(pool(), pool())


def copy_blocks(cache: KvCacheView, pairs: Sequence[tuple[int, int]]) -> None:
    """``pairs`` of (source, destination) block ids. All sources are read before any destination is written."""
    if not pairs:
        return
    sources, destinations = to_device(np.array(pairs).T.copy(), cache.key_cache[0].device)
    for tensor in (*cache.key_cache, *cache.value_cache):
        tensor[destinations] = tensor[sources]
