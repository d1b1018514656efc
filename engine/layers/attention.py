"""Self-attention: projections, rotation, norms and query scaling around the attention backend. T tokens."""

import torch
from torch import nn

from engine.attention.backend import KvCacheView, StepAttention
from engine.batch import StepAdapters
from engine.layer_config import QkNorm, TemperatureConfig
from engine.layers.linear import ColumnParallelLinear, ColumnPart, RowParallelLinear
from engine.layers.norm import RmsNorm, rms_normalize
from engine.layers.rotary import Rotation
from engine.model_config import ModelConfig
from engine.parameter import ParameterBuilder, Split


class Attention(nn.Module):
    """Grouped-query attention, its heads divided over the tensor-parallel ranks. ``layer``: its index in the model."""

    def __init__(self, build: ParameterBuilder, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self.use_rope = config.layers[layer].use_rope
        self._qk_norm = config.layers[layer].qk_norm
        if self._qk_norm is QkNorm.WEIGHTED_BEFORE_ROPE:
            self.query_norm = RmsNorm(build, "q_norm", config.head_dim, config.rms_norm_eps)
            self.key_norm = RmsNorm(build, "k_norm", config.head_dim, config.rms_norm_eps)
        self._temperature = config.layers[layer].temperature
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        kv_split = _kv_split(build.tp, config.num_kv_heads)
        parts = [
            ColumnPart("q_proj", query_size, build.tp),
            ColumnPart("k_proj", kv_size, kv_split),
            ColumnPart("v_proj", kv_size, kv_split),
        ]
        self.qkv = ColumnParallelLinear(build, config.hidden_size, parts, config.attention_bias)
        self.output = RowParallelLinear(build, "o_proj", query_size, config.hidden_size, config.attention_bias)
        self.num_heads, self.num_kv_heads = (size // config.head_dim for size in self.qkv.local_sizes[:2])

    @property
    def qk_norm(self) -> QkNorm | None:
        return self._qk_norm

    @property
    def temperature(self) -> TemperatureConfig | None:
        return self._temperature

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation,
        kv_cache: KvCacheView,
        attention: StepAttention,
        adapters: StepAdapters | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size], the same on all ranks. ``positions``: [T] int64."""
        parts = self.qkv.forward(hidden, adapters).split(self.qkv.local_sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self._qk_norm is QkNorm.WEIGHTED_BEFORE_ROPE:
            query, key = self.query_norm.forward(query), self.key_norm.forward(key)
        # Where nothing follows the rotation, the backend turns keys on their way to the cache.
        last_turn = rotation if self.use_rope else None
        if self.use_rope and self._qk_norm is QkNorm.UNWEIGHTED_AFTER_ROPE:
            query, key = rotation.apply(query), rotation.apply(key)
            last_turn = None
        if self._qk_norm is QkNorm.UNWEIGHTED_AFTER_ROPE:
            query, key = rms_normalize(query, self._eps), rms_normalize(key, self._eps)
        if self._temperature:
            query = (query * query_scales(self._temperature, positions)[:, None, None]).to(query.dtype)
        attended = attention.forward(self.layer, query, key, value, kv_cache, last_turn)
        return self.output.forward(attended.flatten(1), adapters)


def query_scales(config: TemperatureConfig, positions: torch.Tensor) -> torch.Tensor:
    """Llama 4's attention temperature at ``positions`` [T]: float32 factors [T] on the queries."""
    return torch.log1p(torch.floor((positions.float() + 1.0) / config.floor)) * config.scale + 1.0


def _kv_split(tp: Split, num_kv_heads: int) -> Split:
    """Where there are more ranks than KV heads, neighbouring ranks hold the same one."""
    if tp.degree <= num_kv_heads:
        return tp
    return Split(num_kv_heads, tp.index // (tp.degree // num_kv_heads))
