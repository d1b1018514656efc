"""Decoder layers, or their attention halves, as single native calls, where a layer, a step and the CPU allow it. The
same kernels in the same order as the layers' own ``forward``, so the same results; what is saved is the way from one to
the next. T tokens."""

from dataclasses import dataclass
from typing import Self

import torch

from engine.attention.backend import KvCacheView, StepAttention
from engine.attention.cpu import CpuStepAttention, native_step
from engine.kernels.decoder_layer import (
    NativeBuffers,
    NativeLayer,
    decoder_layer,
    has_decoder_layer,
)
from engine.kernels.linear import MOST_TOKENS
from engine.kernels.mixture import NativeMixture
from engine.kernels.native_matrix import NativeMatrix
from engine.layer_config import QkNorm, TemperatureConfig
from engine.layers.attention import Attention, query_scales
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.moe import MixtureOfExperts
from engine.layers.native_matrices import native_linears
from engine.layers.norm import RmsNorm
from engine.layers.rotary import Rotation
from engine.parallel.collectives import Collectives, LocalCollectives
from engine.parallel.shared_memory import SharedMemoryCollectives


@dataclass(frozen=True)
class NativeDecoderLayer:
    """``index``: of the layer in the model. ``is_whole``: the native part is the whole layer, else its attention half.
    ``kept``: what ``layer`` and ``mixture`` have addresses of."""

    index: int
    layer: NativeLayer
    mixture: NativeMixture | None
    is_whole: bool
    temperature: TemperatureConfig | None
    tp: Collectives
    kept: tuple[object, ...]

    @classmethod
    def of(
        cls,
        attention: Attention,
        feed_forward: object,
        norms: tuple[RmsNorm, RmsNorm],
        tp: Collectives,
        *,
        interleaved: bool,
    ) -> Self | None:
        """None where attention has parts that the native one lacks. To be made when the weights are in place."""
        if not has_decoder_layer() or attention.qk_norm is QkNorm.WEIGHTED_BEFORE_ROPE:
            return None
        if not isinstance(tp, LocalCollectives | SharedMemoryCollectives):
            return None
        halves = [native_linears(attention.qkv, attention.output)]
        if isinstance(feed_forward, GatedFeedForward):
            halves.append(native_linears(feed_forward.gate_up, feed_forward.down))
        is_dense = len(halves) == 2 and halves[1] is not None
        mixture = feed_forward.native() if isinstance(feed_forward, MixtureOfExperts) else None
        if halves[0] is None or any(norm.weight.dtype is not torch.bfloat16 for norm in norms):
            return None
        linears = [linear for half in halves if half is not None for linear in half]
        matrices = [matrix for matrix, _ in linears]
        layer = NativeLayer(
            *matrices,
            *(NativeMatrix() for _ in range(4 - len(matrices))),
            *(norm.weight.data_ptr() for norm in norms),
            tp.address if isinstance(tp, SharedMemoryCollectives) else None,
            tp.split_bytes if isinstance(tp, SharedMemoryCollectives) else 0,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            attention.use_rope,
            interleaved,
            attention.qk_norm is QkNorm.UNWEIGHTED_AFTER_ROPE,
            attention.temperature is not None,
            norms[0].eps,
        )
        kept: list[object] = [tensor for _, tensors in linears for tensor in tensors]
        kept += [norm.weight for norm in norms]
        native, parts = (None, ()) if mixture is None else mixture
        is_whole = is_dense or native is not None
        return cls(attention.layer, layer, native, is_whole, attention.temperature, tp, (*kept, *parts))


class NativeStep:
    """One step's tokens, for the layers that are native."""

    def __init__(
        self,
        attention: CpuStepAttention,
        kv_cache: KvCacheView,
        rotation: Rotation,
        positions: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        self._attention = attention
        self._kv_cache = kv_cache
        self._rotation = rotation
        self._positions = positions
        self._scales: dict[TemperatureConfig, torch.Tensor] = {}
        self._output = torch.empty_like(hidden)
        self._buffers: dict[tuple[int, ...], tuple[NativeBuffers, list[torch.Tensor]]] = {}

    @classmethod
    def of(
        cls,
        layer: NativeDecoderLayer,
        attention: StepAttention,
        kv_cache: KvCacheView,
        rotation: Rotation,
        positions: torch.Tensor,
        hidden: torch.Tensor,
    ) -> Self | None:
        """None for a step that native layers, such as this one, do not compute."""
        if not 0 < len(hidden) <= MOST_TOKENS or hidden.dtype is not torch.bfloat16:
            return None
        heads = hidden.new_empty(0, layer.layer.num_heads, layer.layer.head_dim)
        step = native_step(attention, heads, kv_cache)
        return None if step is None else cls(step, kv_cache, rotation, positions, hidden)

    def run(self, layer: NativeDecoderLayer, hidden: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
        """``hidden`` [T, n] += ``update``, in place, and, where the layer is whole, what attention gives. Returns what
        is still to be added."""
        seen, slot = self._attention.native(layer.index, self._kv_cache)
        caches = self._kv_cache.key_cache[slot], self._kv_cache.value_cache[slot]
        result = decoder_layer(
            layer.layer, layer.mixture, seen, self._space(layer), hidden, update, self._output, caches
        )
        if result and isinstance(layer.tp, SharedMemoryCollectives):
            layer.tp.fail(result, "all-reduce")
        return self._output

    def _space(self, native: NativeDecoderLayer) -> NativeBuffers:
        """The same for all layers of one shape."""
        layer = native.layer
        query_size = layer.num_heads * layer.head_dim
        widths = (
            layer.qkv.num_inputs,
            layer.qkv.num_outputs,
            query_size,
            query_size,
            layer.gate_up.num_outputs,
            layer.down.num_inputs,
        )
        if widths not in self._buffers:
            num_tokens = len(self._output)
            tensors = [self._output.new_empty(num_tokens, width) for width in widths]
            angles = [self._rotation.cos.contiguous(), self._rotation.sin.contiguous()]
            pointers = [tensor.data_ptr() for tensor in (*tensors, *angles)]
            self._buffers[widths] = NativeBuffers(*pointers, None, num_tokens), tensors + angles
        buffers, _ = self._buffers[widths]
        if native.temperature is not None:
            buffers.query_scales = self._scales_of(native.temperature).data_ptr()
        return buffers

    def _scales_of(self, temperature: TemperatureConfig) -> torch.Tensor:
        if temperature not in self._scales:
            self._scales[temperature] = query_scales(temperature, self._positions).contiguous()
        return self._scales[temperature]
