"""DeepSeek-V3 ("DeepseekV3ForCausalLM"): attention through a latent that all heads share, the first layers dense, the
others mixtures with a shared expert. The layer after the last (next-token prediction) is not counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.layer_config import LayerConfig, MoeConfig
from engine.layers.experts import ExpertNames, make_experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.norm import RmsNorm
from engine.model_config import ModelConfig
from engine.models.shapes.frame import DecoderShapes, planned_config
from engine.models.shapes.model_shapes import ModelShapes
from engine.parameter import ParameterBuilder, Split
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization.registry import make_matrix


@dataclass(frozen=True)
class _Sizes:
    """Of attention, in elements. ``query_latent`` 0: queries are projected at once."""

    query_latent: int
    kv_latent: int
    rope: int
    nope: int
    value: int
    num_shared_experts: int


def read_shapes(config: Mapping[str, Any]) -> ModelShapes:
    sizes = _Sizes(
        query_latent=int(config.get("q_lora_rank") or 0),
        kv_latent=int(config["kv_lora_rank"]),
        rope=int(config["qk_rope_head_dim"]),
        nope=int(config["qk_nope_head_dim"]),
        value=int(config["v_head_dim"]),
        num_shared_experts=int(config.get("n_shared_experts") or 0),
    )
    moe = MoeConfig(
        num_experts=int(config["n_routed_experts"]),
        num_experts_per_token=int(config["num_experts_per_tok"]),
        intermediate_size=int(config["moe_intermediate_size"]),
        normalize_scores=True,
        has_shared_expert=sizes.num_shared_experts > 0,
    )
    width, num_dense = int(config["intermediate_size"]), int(config["first_k_dense_replace"])
    layers = [LayerConfig(width, moe=moe if i >= num_dense else None) for i in range(int(config["num_hidden_layers"]))]
    model = planned_config("DeepseekV3ForCausalLM", config, layers, head_dim=sizes.nope + sizes.rope)
    return ModelShapes(
        model,
        lambda c, build: DecoderShapes(c, build, partial(_Layer, c, sizes)),
        latent_kv_size=sizes.kv_latent + sizes.rope,
    )


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, sizes: _Sizes, build: ParameterBuilder, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = _LatentAttention(config, sizes, build.at("self_attn"))
        mlp = build.at("mlp")
        if moe := config.layers[layer].moe:
            self.mixture = _Mixture(mlp, size, moe, sizes.num_shared_experts)
        else:
            self.feed_forward = GatedFeedForward(mlp, size, config.layers[layer].intermediate_size)
        names = ("input_layernorm", "post_attention_layernorm")
        self.norms = nn.ModuleList(RmsNorm(build, name, size, config.rms_norm_eps) for name in names)


class _LatentAttention(nn.Module):
    """What leads into the latents is whole on every rank; what leads out of them is divided by heads."""

    def __init__(self, config: ModelConfig, sizes: _Sizes, build: ParameterBuilder) -> None:
        super().__init__()
        size, heads, eps = config.hidden_size, config.num_heads, config.rms_norm_eps
        query_size = heads * (sizes.nope + sizes.rope)
        if sizes.query_latent:
            self.query_down = _matrix(build, "q_a_proj", sizes.query_latent, size)
            self.query_norm = RmsNorm(build, "q_a_layernorm", sizes.query_latent, eps)
            self.query_up = _matrix(build, "q_b_proj", query_size, sizes.query_latent, build.tp)
        else:
            self.query = _matrix(build, "q_proj", query_size, size, build.tp)
        self.kv_down = _matrix(build, "kv_a_proj_with_mqa", sizes.kv_latent + sizes.rope, size)
        self.kv_norm = RmsNorm(build, "kv_a_layernorm", sizes.kv_latent, eps)
        self.kv_up = _matrix(build, "kv_b_proj", heads * (sizes.nope + sizes.value), sizes.kv_latent, build.tp)
        self.output = make_matrix(build, [MatrixPart("o_proj", size, heads * sizes.value, inputs=build.tp)])


class _Mixture(nn.Module):
    def __init__(self, build: ParameterBuilder, hidden_size: int, config: MoeConfig, num_shared: int) -> None:
        super().__init__()
        self.router = build.whole("gate.weight", config.num_experts, hidden_size)
        bias = torch.empty(config.num_experts, dtype=torch.float32, device=build.device)
        self.register_buffer("router_bias", bias)
        self.experts = make_experts(build.at("experts"), hidden_size, config, ExpertNames())
        if num_shared:
            width = num_shared * config.intermediate_size
            self.shared = GatedFeedForward(build.at("shared_experts"), hidden_size, width)


def _matrix(
    build: ParameterBuilder, name: str, num_outputs: int, num_inputs: int, outputs: Split = Split()
) -> WeightMatrix:
    return make_matrix(build, [MatrixPart(name, num_outputs, num_inputs, outputs)])
