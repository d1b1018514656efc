"""The frame that all Llama-class models share: embedding, decoder layers, final norm, output head. T tokens."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from engine.attention.backend import KvCacheView, StepAttention
from engine.batch import ForwardBatch, StepAdapters
from engine.layers.attention import Attention
from engine.layers.embedding import VocabEmbedding
from engine.layers.moe import MixtureOfExperts
from engine.layers.native_decoder import NativeDecoderLayer, NativeStep
from engine.layers.norm import RmsNorm
from engine.layers.rotary import RotaryEmbedding, Rotation
from engine.model_config import ModelConfig
from engine.parallel.collectives import Collectives
from engine.parallel.lasting_axis import LastingAxis
from engine.parameter import ParameterBuilder
from engine.progress import Operation


class FeedForward(Protocol):
    """A dense layer or a mixture of experts."""

    def forward(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size], the same on all ranks. ``adapters``: of the T tokens."""
        ...


FeedForwardFactory = Callable[[ParameterBuilder, ModelConfig, int], FeedForward]
"""Makes the feed-forward part of a layer from the layer's builder, the model's configuration and the layer's index."""


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)). Each addition waits for the norm that follows it, with which
    it may be one pass over memory."""

    def __init__(
        self, build: ParameterBuilder, config: ModelConfig, layer: int, make_feed_forward: FeedForwardFactory
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RmsNorm(build, "input_layernorm", size, eps)
        self.attention = Attention(build.at("self_attn"), config, layer)
        self.feed_forward_norm = RmsNorm(build, "post_attention_layernorm", size, eps)
        self.feed_forward = make_feed_forward(build, config, layer)
        self._progress, self.index = build.mesh.progress, layer

    def forward(
        self,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        positions: torch.Tensor,
        rotation: Rotation,
        kv_cache: KvCacheView,
        attention: StepAttention,
        adapters: StepAdapters | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` [T, hidden_size] and what is still to be added to it, to the same after this layer."""
        self._progress.at(Operation.ATTENTION, self.index)
        hidden, normed = self.attention_norm.add(hidden, update)
        update = self.attention.forward(normed, positions, rotation, kv_cache, attention, adapters)
        return self.feed_forward_part(hidden, update, adapters)

    def feed_forward_part(
        self, hidden: torch.Tensor, update: torch.Tensor, adapters: StepAdapters | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The second half of ``forward``, given what attention is to add."""
        self._progress.at(Operation.FEED_FORWARD, self.index)
        hidden, normed = self.feed_forward_norm.add(hidden, update)
        return hidden, self.feed_forward.forward(normed, adapters)

    def native(self, tp: Collectives, *, interleaved: bool) -> NativeDecoderLayer | None:
        """The same layer as one native call, where there is such."""
        norms = self.attention_norm, self.feed_forward_norm
        return NativeDecoderLayer.of(self.attention, self.feed_forward, norms, tp, interleaved=interleaved)


class DecoderModel(nn.Module):
    """A whole model; what differs between architectures is how a layer's feed-forward part is made.

    A pipeline stage has its layers, with the embedding in the first stage and the final norm and the head in the last;
    a tied embedding stands in both.
    """

    def __init__(self, config: ModelConfig, build: ParameterBuilder, make_feed_forward: FeedForwardFactory) -> None:
        super().__init__()
        self.config, self.dtype = config, build.dtype
        body = build.at("model")
        mesh = build.mesh
        self.embedding = self.norm = self.head = None
        if mesh.is_first_stage or (mesh.is_last_stage and config.tie_word_embeddings):
            self.embedding = VocabEmbedding(body, "embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(body.at(f"layers.{layer}"), config, layer, make_feed_forward) for layer in mesh.layers(config)
        )
        if mesh.is_last_stage:
            self.norm = RmsNorm(body, "norm", config.hidden_size, config.rms_norm_eps)
            self.head = self.embedding
        if mesh.is_last_stage and not config.tie_word_embeddings:
            self.head = VocabEmbedding(build, "lm_head", config.vocab_size, config.hidden_size)
        self._tp, self._progress = mesh.tp, mesh.progress
        self._native: tuple[Collectives, list[NativeDecoderLayer | None]] | None = None
        self._rotary = RotaryEmbedding(config.rope, build.device)
        self.slices, self.conversions = tuple(build.slices), tuple(build.conversions)

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCacheView,
        attention: StepAttention,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, hidden_size] after the stage's layers, the same on all tp ranks; normalised after the last.

        ``hidden``: those of the stage before; None in the first.
        """
        rotation = self._rotary.rotation(batch)
        if hidden is None:
            assert self.embedding is not None, "a later stage continues hidden states"
            self._progress.at(Operation.EMBEDDING)
            hidden = self.embedding.forward(batch.token_ids)
        update = None
        step = self._native_step(batch, kv_cache, attention, rotation, hidden)
        for layer, native in zip(self.layers, self._native_layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            if step is not None and native is not None:
                self._progress.at(Operation.LAYER if native.is_whole else Operation.ATTENTION, native.index)
                update = step.run(native, hidden, update)
                if not native.is_whole:
                    hidden, update = layer.feed_forward_part(hidden, update, batch.adapters)
                continue
            hidden, update = layer.forward(
                hidden, update, batch.positions, rotation, kv_cache, attention, batch.adapters
            )
        if self.norm is not None:
            return self.norm.add(hidden, update)[1]
        return hidden if update is None else hidden + update

    def forward_idle(self) -> None:
        """This rank's part of a step in which its dp group has no tokens: its experts work for the others'."""
        empty = next(self.parameters()).new_empty(0, self.config.hidden_size, dtype=self.dtype)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if isinstance(layer.feed_forward, MixtureOfExperts):
                self._progress.at(Operation.FEED_FORWARD, layer.index)
                layer.feed_forward.forward(empty)

    @property
    def _native_layers(self) -> list[NativeDecoderLayer | None]:
        """Made at the first step, when the weights are in place, and again when the gang has formed anew."""
        group = self._tp.group if isinstance(self._tp, LastingAxis) else self._tp
        if self._native is None or self._native[0] is not group:
            interleaved = self.config.rope.interleaved
            layers = (layer for layer in self.layers if isinstance(layer, DecoderLayer))
            self._native = group, [layer.native(group, interleaved=interleaved) for layer in layers]
        return self._native[1]

    def _native_step(
        self,
        batch: ForwardBatch,
        kv_cache: KvCacheView,
        attention: StepAttention,
        rotation: Rotation,
        hidden: torch.Tensor,
    ) -> NativeStep | None:
        first = next((native for native in self._native_layers if native is not None), None)
        if first is None or batch.adapters is not None:
            return None
        return NativeStep.of(first, attention, kv_cache, rotation, batch.positions, hidden)

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor | None:
        """[R, hidden_size] to [R, vocab_size] float32 on tp rank 0 of the last stage, None elsewhere; to be called on
        all tp ranks."""
        self._progress.at(Operation.LOGITS)
        return None if self.head is None else self.head.logits(hidden_rows)
