"""The attention seam: how a model attends through the paged KV cache, whatever kernel does it.

The model runner calls ``plan`` once per step; every layer of the model then calls ``forward`` on what it returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import ForwardBatch
from engine.config import KvGroupConfig


class Rotation(Protocol):
    """How a step's queries and keys are turned to their positions; see engine.layers.rotary."""

    @property
    def cos(self) -> torch.Tensor:
        """[T, 1, head_dim / 2] float32; ``sin`` likewise."""
        ...

    @property
    def sin(self) -> torch.Tensor: ...

    @property
    def interleaved(self) -> bool:
        """Whether element 2i turns with 2i + 1; else i with i + head_dim / 2."""
        ...

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """[T, num_heads, head_dim], turned."""
        ...


@dataclass(frozen=True)
class KvCacheView:
    """The KV pool of one rank, one pair of tensors per layer slot: slot s holds the s-th layer of every group.

    Each is [num_blocks, block_size, num_local_kv_heads, head_dim] in the model's dtype. Block NULL_BLOCK stays zero.
    """

    key_cache: tuple[torch.Tensor, ...]
    value_cache: tuple[torch.Tensor, ...]


class StepAttention(Protocol):
    """Attention of one step, with everything prepared that its layers share."""

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KvCacheView,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Write keys and values of the step's tokens to the cache, then attend.

        Args:
            layer: index of the layer in the model.
            query: [T, num_local_heads, head_dim]; scores are divided by sqrt(head_dim).
            key: [T, num_local_kv_heads, head_dim].
            value: as ``key``.
            kv_cache: the pool, written in place.
            rotation: turns queries and keys before anything else; None where that has been done or is not wanted.

        Returns:
            [T, num_local_heads, head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """A way to attend. Stateless between steps."""

    def plan(self, batch: ForwardBatch, groups: Sequence[KvGroupConfig], block_size: int) -> StepAttention:
        """Prepare one step. ``batch.block_tables[g]`` and ``slot_mapping[g]`` belong to ``groups[g]``."""
        ...
