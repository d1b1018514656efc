"""How many bytes each rank will hold, from shapes alone: the model is built on the meta device and its slices are added
up, so the ledger comes from the same code as the real parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig, kv_groups, num_local_kv_heads
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardBytes:
    """Bytes of one rank's parameters by kind: embedding, head, attention, experts, feed_forward, norm."""

    by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def shard_bytes(config: ModelConfig, parallel: ParallelConfig, rank: int, dtype: Dtype) -> ShardBytes:
    """Parameter bytes of global rank ``rank``, padding of the vocabulary included.

    Raises LayoutError where the model cannot be divided so.
    """
    model = build_model(config, Mesh(parallel, rank), dtype, torch.device("meta"))
    assert isinstance(model, torch.nn.Module)
    by_kind: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = _kind(name)
        by_kind[kind] = by_kind.get(kind, 0) + parameter.numel() * parameter.element_size()
    return ShardBytes(by_kind)


def kv_block_bytes(config: ModelConfig, parallel: ParallelConfig, block_size: int, dtype: Dtype) -> int:
    """Bytes of one KV block on each rank: keys and values of ``block_size`` tokens in the layers of one group."""
    layers_per_group = len(kv_groups(config)[0].layers)
    heads = num_local_kv_heads(config, parallel)
    return 2 * layers_per_group * block_size * heads * config.head_dim * dtype.num_bytes


def _kind(parameter_name: str) -> str:
    """From the names of DecoderModel's modules."""
    for part, kind in (
        ("embedding", "embedding"),
        ("head", "head"),
        ("norm", "norm"),
        ("attention", "attention"),
        (".experts", "experts"),
    ):
        if part in parameter_name:
            return kind
    return "feed_forward"
