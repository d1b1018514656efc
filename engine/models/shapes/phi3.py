"""Phi-3 and Phi-4 ("Phi3ForCausalLM"): a Llama whose projections are stored fused."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from engine.layer_config import LayerConfig
from engine.layers.norm import RmsNorm
from engine.model_config import ModelConfig, num_local_kv_heads
from engine.models.shapes.frame import DecoderShapes, planned_config
from engine.models.shapes.model_shapes import ModelShapes
from engine.parameter import ParameterBuilder
from engine.quantization.matrix import MatrixPart
from engine.quantization.registry import make_matrix


def read_shapes(config: Mapping[str, Any]) -> ModelShapes:
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    window = config.get("sliding_window")
    layer = LayerConfig(int(config["intermediate_size"]), window_size=int(window) if window else None)
    layers = (layer,) * int(config["num_hidden_layers"])
    model = planned_config("Phi3ForCausalLM", config, layers, head_dim=head_dim)
    return ModelShapes(model, lambda c, build: DecoderShapes(c, build, partial(_Layer, c)))


class _Layer(nn.Module):
    """A rank's share of the two fused matrices counts as a matrix of its own: nothing is loaded."""

    def __init__(self, config: ModelConfig, build: ParameterBuilder, layer: int) -> None:
        super().__init__()
        size, width, tp = config.hidden_size, config.layers[layer].intermediate_size, build.tp
        query_size = config.num_heads * config.head_dim
        local_kv_size = num_local_kv_heads(config, build.mesh.config) * config.head_dim
        attention, feed_forward = build.at("self_attn"), build.at("mlp")
        qkv = MatrixPart("qkv_proj", tp.size(query_size) + 2 * local_kv_size, size)
        self.attention_in = make_matrix(attention, [qkv])
        self.attention_out = make_matrix(attention, [MatrixPart("o_proj", size, query_size, inputs=tp)])
        self.gate_up = make_matrix(feed_forward, [MatrixPart("gate_up_proj", 2 * tp.size(width), size)])
        self.down = make_matrix(feed_forward, [MatrixPart("down_proj", size, width, inputs=tp)])
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(f"{name}_norm", RmsNorm(build, name, size, config.rms_norm_eps))
