"""Behaviours that implementers get wrong, each with a way to get it wrong on purpose.

A mutation changes the model's configuration or replaces one function; ``test_mutations`` asserts that parity with
transformers is lost. The order of rotation and query/key norm is missing here: the norm has no weights and a rotation
keeps lengths, so no test could tell.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import engine.attention.reference as reference_attention
import engine.layers.attention as attention_layer
import engine.layers.experts as experts_layer
import engine.layers.feed_forward as feed_forward_layer
import engine.layers.moe as moe_layer
import engine.layers.rotary as rotary
from engine.batch import ForwardBatch
from engine.layer_config import LayerConfig, QkNorm, TemperatureConfig
from engine.layers.activation import silu_and_multiply
from engine.layers.norm import RmsNorm, rms_normalize
from engine.layers.router import Router, SigmoidRouter, SoftmaxRouter
from engine.model_config import ModelConfig
from engine.parallel.token_dispatch import ReplicatedDispatch
from engine.rope_config import RopeType

ConfigChange = Callable[[ModelConfig], ModelConfig]
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """``behaviour``: what is switched off, and so the test's name. ``is_refused``: the changed model needs tensors, or
    shapes, that the checkpoint does not have, so it is noticed before anything is computed."""

    behaviour: str
    architecture: str
    change: ConfigChange = lambda config: config
    patch: Patch = lambda monkeypatch: None
    is_refused: bool = False


def layers(change: Callable[[int, LayerConfig], LayerConfig]) -> ConfigChange:
    return lambda config: replace(config, layers=tuple(change(i, layer) for i, layer in enumerate(config.layers)))


def rope(**values: Any) -> ConfigChange:
    return lambda config: replace(config, rope=replace(config.rope, **values))


def attribute(owner: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def every_layer(**values: Any) -> ConfigChange:
    return layers(lambda i, layer: replace(layer, **values))


def every_mixture(**values: Any) -> ConfigChange:
    return layers(lambda i, layer: replace(layer, moe=replace(layer.moe, **values) if layer.moe else None))


def mixtures_in(*places: int) -> ConfigChange:
    def change(config: ModelConfig) -> ModelConfig:
        moe = next(layer.moe for layer in config.layers if layer.moe)
        return layers(lambda i, layer: replace(layer, moe=moe if i in places else None))(config)

    return change


def shifted_moe_layers(config: ModelConfig) -> ModelConfig:
    """Mixtures at 0, step, … instead of step - 1, 2 · step - 1, …"""
    moe = config.layers[1].moe
    return layers(lambda i, layer: replace(layer, moe=moe if i % 2 == 0 else None))(config)


def dense_as_wide_as_experts(config: ModelConfig) -> ModelConfig:
    moe = config.layers[1].moe
    assert moe is not None
    width = moe.intermediate_size
    return layers(lambda i, layer: replace(layer, intermediate_size=width))(config)


class OtherEndDispatch(ReplicatedDispatch):
    """Multiplies outputs by the scores where inputs are due, and the reverse."""

    def __init__(self, first_expert: int, num_experts: int, *, scales_inputs: bool) -> None:
        super().__init__(first_expert, num_experts, scales_inputs=not scales_inputs)


def softmax_over_chosen(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, expert_ids = logits.topk(2, dim=-1)
    return expert_ids, chosen.softmax(-1)


def softmax_choice(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores, expert_ids = logits.softmax(-1).topk(1, dim=-1)
    return expert_ids, scores


def sigmoid_normalized(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, expert_ids = logits.topk(2, dim=-1)
    return expert_ids, chosen.sigmoid() / chosen.sigmoid().sum(-1, keepdim=True)


def renormalized_choice(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    expert_ids = logits.argmax(-1, keepdim=True)
    return expert_ids, torch.ones_like(expert_ids, dtype=logits.dtype)


def norm_after_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted norms put off until the rotation that follows."""
    pending: list[Callable[[torch.Tensor], torch.Tensor]] = []
    rotate = rotary.Rotation.apply

    class LateNorm(RmsNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            pending.append(super().forward)
            return hidden

    monkeypatch.setattr(attention_layer, "RmsNorm", LateNorm)
    monkeypatch.setattr(rotary.Rotation, "apply", lambda self, heads: pending.pop(0)(rotate(self, heads)))


class NormWithoutWeights(RmsNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) / self.weight


class NormOverAllHeads(RmsNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_normalize(hidden.flatten(1), self.eps).view_as(hidden) * self.weight


def no_shared_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        feed_forward_layer.GatedFeedForward, "forward_partial", lambda self, hidden, adapters: torch.zeros_like(hidden)
    )


def prefill_sees_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of prefill look back as far as their first token does, whoever asks."""
    make = reference_attention.PrefillTile

    def widened(start: int, stop: int, slots: torch.Tensor, window: int | None) -> reference_attention.PrefillTile:
        return make(start, stop, slots, None)

    monkeypatch.setattr(reference_attention, "PrefillTile", widened)


def window_for_chunk(i: int, layer: LayerConfig) -> LayerConfig:
    return replace(layer, chunk_size=None, window_size=layer.chunk_size)


def position_only_lengths(batch: ForwardBatch) -> torch.Tensor:
    return (batch.positions + 1)[:, None].float()


def scales_without_floor(config: TemperatureConfig, positions: torch.Tensor) -> torch.Tensor:
    return torch.log1p((positions.float() + 1.0) / config.floor) * config.scale + 1.0


def scales_from_zero(config: TemperatureConfig, positions: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.floor(positions.float() / config.floor)) * config.scale + 1.0


def swapped_gate(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu_and_multiply(torch.cat((up, gate), dim=-1))


SCOUT, MAVERICK, VISION = "llama4-scout", "llama4-maverick", "llama4-vision"
QWEN3_MOE, UNNORMALIZED = "qwen3-moe", "qwen3-moe-unnormalized"
NORM = QkNorm.UNWEIGHTED_AFTER_ROPE
TUNING = TemperatureConfig(floor=8.0, scale=1.0)

MUTATIONS = [
    Mutation("mixtures at step-1, 2·step-1", MAVERICK, shifted_moe_layers, is_refused=True),
    Mutation("dense layers are intermediate_size_mlp wide", MAVERICK, dense_as_wide_as_experts, is_refused=True),
    Mutation("sigmoid routing", SCOUT, patch=attribute(SigmoidRouter, "choose", softmax_choice)),
    Mutation("scores not renormalised", SCOUT, patch=attribute(SigmoidRouter, "choose", renormalized_choice)),
    Mutation("score multiplies the input", SCOUT, patch=attribute(moe_layer, "ReplicatedDispatch", OtherEndDispatch)),
    Mutation("shared expert", SCOUT, patch=no_shared_expert),
    Mutation("gate before up in experts", SCOUT, patch=attribute(experts_layer, "silu_and_multiply", swapped_gate)),
    Mutation("NoPE layers", SCOUT, layers(lambda i, layer: replace(layer, use_rope=True))),
    Mutation("NoPE where (i+1) % 4 == 0", SCOUT, layers(lambda i, layer: replace(layer, use_rope=i % 4 != 0))),
    Mutation("full attention in NoPE layers", SCOUT, layers(lambda i, layer: replace(layer, chunk_size=8))),
    Mutation("chunked attention", SCOUT, layers(lambda i, layer: replace(layer, chunk_size=None))),
    Mutation("chunk size", SCOUT, layers(lambda i, layer: replace(layer, chunk_size=layer.chunk_size and 16))),
    Mutation("chunks, no sliding window", SCOUT, layers(window_for_chunk)),
    Mutation("QK norm", SCOUT, layers(lambda i, layer: replace(layer, qk_norm=None))),
    Mutation("QK norm off where the config says so", MAVERICK, layers(lambda i, layer: replace(layer, qk_norm=NORM))),
    Mutation("QK norm in RoPE layers only", SCOUT, layers(lambda i, layer: replace(layer, qk_norm=NORM))),
    Mutation("temperature", SCOUT, layers(lambda i, layer: replace(layer, temperature=None))),
    Mutation("temperature in NoPE layers only", SCOUT, layers(lambda i, layer: replace(layer, temperature=TUNING))),
    Mutation("temperature's floor", SCOUT, patch=attribute(attention_layer, "query_scales", scales_without_floor)),
    Mutation("temperature of position + 1", SCOUT, patch=attribute(attention_layer, "query_scales", scales_from_zero)),
    Mutation("Llama 4 rotates adjacent pairs", MAVERICK, rope(interleaved=False)),
    Mutation("Llama rotates halves", "llama2", rope(interleaved=True)),
    Mutation("llama3 scaling", "llama3.1", rope(kind=RopeType.DEFAULT)),
    Mutation("llama3 scaling without a middle band", SCOUT, rope(kind=RopeType.DEFAULT)),
    Mutation("llama3 scaling's middle band", "llama3.1", rope(low_freq_factor=4.0)),
    Mutation("factor from the config", "llama3.1", rope(factor=32.0)),
    Mutation("original context from the config", "llama3.1", rope(original_max_positions=128)),
    Mutation("theta from the config", MAVERICK, rope(theta=500000.0)),
    Mutation("linear scaling", "linear", rope(factor=1.0)),
    Mutation("dynamic NTK", "dynamic", rope(kind=RopeType.DEFAULT)),
    Mutation(
        "dynamic NTK by prompt length", "dynamic", patch=attribute(rotary, "_context_lengths", position_only_lengths)
    ),
    Mutation("YaRN", "yarn", rope(kind=RopeType.LINEAR)),
    Mutation("YaRN's attention factor", "yarn", rope(attention_factor=1.0)),
    Mutation("YaRN's ramp begins at beta_fast", "yarn", rope(beta_fast=32.0)),
    Mutation("YaRN's ramp ends at beta_slow", "yarn", rope(beta_slow=1.0)),
    Mutation("YaRN's ramp has whole bounds", "yarn", rope(truncate=False)),
    Mutation("tied embeddings", "llama3.1", lambda config: replace(config, tie_word_embeddings=False), is_refused=True),
    Mutation("untied output head", "llama2", lambda config: replace(config, tie_word_embeddings=True)),
    Mutation("attention bias", "biases", lambda config: replace(config, attention_bias=False)),
    Mutation("feed-forward bias", "biases", lambda config: replace(config, mlp_bias=False)),
    Mutation("RMS epsilon", "llama2", lambda config: replace(config, rms_norm_eps=1e-2)),
    Mutation("theta of Code Llama", "codellama", rope(theta=10000.0)),
    Mutation("as many KV heads as heads", "llama1", lambda config: replace(config, num_kv_heads=1), is_refused=True),
    Mutation("full attention where chunk size is null", "guard4", every_layer(chunk_size=8)),
    Mutation("rotation where the list says so", "guard4", layers(lambda i, layer: replace(layer, use_rope=i != 3))),
    Mutation("dense where no layer is a mixture", "guard4", every_layer(intermediate_size=48), is_refused=True),
    Mutation("text tensors by their prefix", VISION, lambda config: replace(config, tensor_prefix=""), is_refused=True),
    Mutation("sliding window", "mistral", every_layer(window_size=None)),
    Mutation("a window has so many positions", "mistral", every_layer(window_size=9)),
    Mutation("a window counts its own token", "mistral", every_layer(window_size=7)),
    Mutation("windows, no chunks", "mistral", every_layer(window_size=None, chunk_size=8)),
    Mutation("a window ends with its token in prefill", "mistral", patch=prefill_sees_all),
    Mutation("scores renormalised", "mixtral", every_mixture(normalize_scores=False)),
    Mutation("two experts a token", "mixtral", every_mixture(num_experts_per_token=1)),
    Mutation("softmax routing", "mixtral", patch=attribute(SoftmaxRouter, "choose", sigmoid_normalized)),
    Mutation(
        "score multiplies the output", "mixtral", patch=attribute(moe_layer, "ReplicatedDispatch", OtherEndDispatch)
    ),
    Mutation("w1 is the gate", "mixtral", patch=attribute(experts_layer, "silu_and_multiply", swapped_gate)),
    Mutation("QK norm of Qwen3", "qwen3", every_layer(qk_norm=None)),
    Mutation("QK norm before the rotation", "qwen3", patch=norm_after_rotation),
    Mutation("QK norm's weights", "qwen3", patch=attribute(attention_layer, "RmsNorm", NormWithoutWeights)),
    Mutation("QK norm over each head", "qwen3", patch=attribute(attention_layer, "RmsNorm", NormOverAllHeads)),
    Mutation("explicit head size", "qwen3", lambda config: replace(config, head_dim=8), is_refused=True),
    Mutation("windows from max_window_layers on", "qwen3", layers(lambda i, layer: replace(layer, window_size=6))),
    Mutation("windows in some layers", "qwen3", every_layer(window_size=None)),
    Mutation("mixtures by decoder_sparse_step", QWEN3_MOE, mixtures_in(0, 2, 4), is_refused=True),
    Mutation("dense layers by mlp_only_layers", QWEN3_MOE, mixtures_in(1, 3, 5), is_refused=True),
    Mutation("experts' own width", QWEN3_MOE, every_mixture(intermediate_size=96), is_refused=True),
    Mutation("norm_topk_prob true", QWEN3_MOE, every_mixture(normalize_scores=False)),
    Mutation("norm_topk_prob false", UNNORMALIZED, every_mixture(normalize_scores=True)),
    Mutation("softmax over all experts", UNNORMALIZED, patch=attribute(SoftmaxRouter, "choose", softmax_over_chosen)),
    Mutation("window in all of Qwen3 MoE's layers", UNNORMALIZED, every_layer(window_size=None)),
    Mutation("no norm of Llama's queries", "llama2", layers(lambda i, layer: replace(layer, qk_norm=NORM))),
]
