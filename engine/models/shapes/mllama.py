"""Llama 3.2 Vision ("MllamaForConditionalGeneration"): some layers attend to the image instead of the text."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from engine.layer_config import LayerConfig, QkNorm
from engine.layers.attention import Attention
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.norm import RmsNorm
from engine.model_config import ModelConfig
from engine.models.shapes.frame import DecoderShapes, WholeParameters, planned_config
from engine.models.shapes.model_shapes import ModelShapes
from engine.parameter import ParameterBuilder

_NUM_EXTRA_TOKENS = 8
"""Rows of the embedding for the image token, which the head cannot give."""


def read_shapes(config: Mapping[str, Any]) -> ModelShapes:
    text = {**config, **config["text_config"]}
    cross = frozenset(int(layer) for layer in text["cross_attention_layers"])
    self_layer = LayerConfig(int(text["intermediate_size"]))
    cross_layer = replace(self_layer, use_rope=False, qk_norm=QkNorm.WEIGHTED_BEFORE_ROPE)
    layers = [cross_layer if i in cross else self_layer for i in range(int(text["num_hidden_layers"]))]
    head_dim = int(text["hidden_size"]) // int(text["num_attention_heads"])
    model = planned_config(
        "MllamaForConditionalGeneration", text, layers, head_dim=head_dim, tensor_prefix="language_model."
    )
    return ModelShapes(
        model,
        lambda c, build: DecoderShapes(c, build, partial(_Layer, c, cross), _NUM_EXTRA_TOKENS),
        vision=_vision(config["vision_config"], model.hidden_size),
        cross_attention_layers=cross,
    )


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, cross: frozenset[int], build: ParameterBuilder, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = Attention(build.at("cross_attn" if layer in cross else "self_attn"), config, layer)
        self.feed_forward = GatedFeedForward(build.at("mlp"), size, config.layers[layer].intermediate_size)
        names = ("input_layernorm", "post_attention_layernorm")
        self.norms = nn.ModuleList(RmsNorm(build, name, size, config.rms_norm_eps) for name in names)
        if layer in cross:
            self.gates = WholeParameters(build, {"cross_attn_attn_gate": (1,), "cross_attn_mlp_gate": (1,)})


def _vision(vision: Mapping[str, Any], text_size: int) -> dict[str, tuple[int, ...]]:
    """The encoder (a local and a global part) and the projection to the text model."""
    size, patch, num_tiles = (int(vision[key]) for key in ("hidden_size", "patch_size", "max_num_tiles"))
    num_patches = (int(vision["image_size"]) // patch) ** 2 + 1
    num_ratios = len(vision["supported_aspect_ratios"]) + 1
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (size,),
        "patch_embedding.weight": (size, int(vision.get("num_channels", 3)), patch, patch),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (num_patches, size),
        "gated_positional_embedding.tile_embedding.weight": (num_ratios, num_tiles * num_patches * size),
        "multi_modal_projector.weight": (text_size, int(vision["vision_output_dim"])),
        "multi_modal_projector.bias": (text_size,),
    }
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        shapes |= {f"{name}.gate": (1,), f"{name}.embedding.weight": (num_ratios, num_tiles * size)}
    for name in ("layernorm_pre", "layernorm_post"):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for layer in range(int(vision["num_hidden_layers"])):
        shapes |= _vision_layer(f"transformer.layers.{layer}", size, int(vision["intermediate_size"]))
    for layer in range(int(vision["num_global_layers"])):
        at = f"global_transformer.layers.{layer}"
        shapes |= _vision_layer(at, size, int(vision["intermediate_size"]))
        shapes |= {f"{at}.gate_attn": (1,), f"{at}.gate_ffn": (1,)}
    return shapes


def _vision_layer(at: str, size: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"{at}.self_attn.{name}.weight"] = (size, size)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes |= {f"{at}.{name}.weight": (size,), f"{at}.{name}.bias": (size,)}
    shapes |= {f"{at}.mlp.fc1.weight": (width, size), f"{at}.mlp.fc1.bias": (width,)}
    return shapes | {f"{at}.mlp.fc2.weight": (size, width), f"{at}.mlp.fc2.bias": (size,)}
