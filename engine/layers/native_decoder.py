"""Dense decoder layers as single native calls, where a layer, a step and the CPU allow it. The same kernels in the same
order as the layers' own ``forward``, so the same results; what is saved is the way from one to the next. T tokens."""

from dataclasses import dataclass
from typing import Self

import torch

from engine.attention.backend import KvCacheView, StepAttention
from engine.attention.cpu import CpuStepAttention, native_step
from engine.kernels.decoder_layer import (
    NativeBuffers,
    NativeLayer,
    NativeMatrix,
    decoder_layer,
    has_decoder_layer,
    native_matrix,
)
from engine.kernels.linear import MOST_TOKENS
from engine.layers.attention import Attention
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.norm import RmsNorm
from engine.layers.rotary import Rotation
from engine.parallel.collectives import Collectives, LocalCollectives
from engine.parallel.shared_memory import SharedMemoryCollectives
from engine.quantization.dense import DenseMatrix
from engine.quantization.matrix import WeightMatrix


@dataclass(frozen=True)
class NativeDecoderLayer:
    """``index``: of the layer in the model. ``kept``: tensors whose addresses ``layer`` has."""

    index: int
    layer: NativeLayer
    tp: Collectives
    kept: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, attention: Attention, feed_forward: object, norms: tuple[RmsNorm, RmsNorm], tp: Collectives
    ) -> Self | None:
        """None where the layer has parts that the native one lacks. To be made when the weights are in place."""
        if not has_decoder_layer() or not isinstance(feed_forward, GatedFeedForward) or not attention.is_plain:
            return None
        if not isinstance(tp, LocalCollectives | SharedMemoryCollectives):
            return None
        linears = (attention.qkv, attention.output, feed_forward.gate_up, feed_forward.down)
        found = [_matrix(linear.matrix) for linear in linears]
        matrices = [matrix for matrix, _ in found if matrix is not None]
        if len(matrices) < len(linears) or any(linear.bias is not None for linear in linears):
            return None
        if any(norm.weight.dtype is not torch.bfloat16 for norm in norms):
            return None
        layer = NativeLayer(
            *matrices,
            *(norm.weight.data_ptr() for norm in norms),
            tp.address if isinstance(tp, SharedMemoryCollectives) else None,
            tp.split_bytes if isinstance(tp, SharedMemoryCollectives) else 0,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            attention.use_rope,
            norms[0].eps,
        )
        kept = tuple(tensor for _, tensors in found for tensor in tensors)
        return cls(attention.layer, layer, tp, (*kept, *(norm.weight for norm in norms)))


class NativeStep:
    """One step's tokens, for the layers that are native."""

    def __init__(
        self, attention: CpuStepAttention, kv_cache: KvCacheView, rotation: Rotation, hidden: torch.Tensor
    ) -> None:
        self._attention = attention
        self._kv_cache = kv_cache
        self._rotation = rotation
        self._output = torch.empty_like(hidden)
        self._buffers: dict[tuple[int, ...], tuple[NativeBuffers, list[torch.Tensor]]] = {}

    @classmethod
    def of(
        cls,
        layer: NativeDecoderLayer,
        attention: StepAttention,
        kv_cache: KvCacheView,
        rotation: Rotation,
        hidden: torch.Tensor,
    ) -> Self | None:
        """None for a step that native layers, such as this one, do not compute."""
        if rotation.interleaved or not 0 < len(hidden) <= MOST_TOKENS or hidden.dtype is not torch.bfloat16:
            return None
        heads = hidden.new_empty(0, layer.layer.num_heads, layer.layer.head_dim)
        step = native_step(attention, heads, kv_cache)
        return None if step is None else cls(step, kv_cache, rotation, hidden)

    def run(self, layer: NativeDecoderLayer, hidden: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
        """``hidden`` [T, n] += ``update`` and what attention gives, in place; returns what is still to be added."""
        seen, slot = self._attention.native(layer.index, self._kv_cache)
        caches = self._kv_cache.key_cache[slot], self._kv_cache.value_cache[slot]
        result = decoder_layer(layer.layer, seen, self._space(layer.layer), hidden, update, self._output, caches)
        if result and isinstance(layer.tp, SharedMemoryCollectives):
            layer.tp.fail(result, "all-reduce")
        return self._output

    def _space(self, layer: NativeLayer) -> NativeBuffers:
        """The same for all layers of one shape."""
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
            self._buffers[widths] = NativeBuffers(*pointers, num_tokens), tensors + angles
        return self._buffers[widths][0]


def _matrix(matrix: WeightMatrix) -> tuple[NativeMatrix | None, list[torch.Tensor]]:
    """And the tensors that it points to."""
    if isinstance(matrix, DenseMatrix):
        return native_matrix(matrix.weight, None), [matrix.weight]
    codes = matrix.int8_codes()
    return (None, []) if codes is None else (native_matrix(*codes), list(codes))
