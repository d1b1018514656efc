"""Gemma 3 ("Gemma3ForConditionalGeneration" with a SigLIP encoder, "Gemma3ForCausalLM" without): four norms a layer,
five sliding layers before each full one, a tied embedding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from engine.layer_config import LayerConfig, QkNorm
from engine.layers.attention import Attention
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.norm import RmsNorm
from engine.model_config import ModelConfig
from engine.models.shapes.frame import DecoderShapes, planned_config
from engine.models.shapes.model_shapes import ModelShapes
from engine.parameter import ParameterBuilder

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "head_dim": 256,
}
"""What transformers assumes where config.json is silent."""
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def read_shapes(config: Mapping[str, Any]) -> ModelShapes:
    has_vision = "vision_config" in config
    architecture = "Gemma3ForConditionalGeneration" if has_vision else "Gemma3ForCausalLM"
    text = {**_DEFAULTS, **config, **(config.get("text_config") or {})}
    # Of the rotation, which differs between the kinds of layers, nothing has a shape; the positions are stretched ones.
    text["rope_parameters"] = text["rope_scaling"] = None
    model = planned_config(
        architecture,
        text,
        _layers(text),
        head_dim=int(text["head_dim"]),
        tensor_prefix="language_model." if has_vision else "",
    )
    return ModelShapes(
        model,
        lambda c, build: DecoderShapes(c, build, partial(_Layer, c)),
        vision=_vision(config["vision_config"], model.hidden_size) if has_vision else {},
    )


def _layers(text: Mapping[str, Any]) -> list[LayerConfig]:
    count = int(text["num_hidden_layers"])
    pattern = int(text.get("sliding_window_pattern") or 6)
    sliding = "sliding_attention"
    kinds = text.get("layer_types") or [sliding if (i + 1) % pattern else "full_attention" for i in range(count)]
    width, window = int(text["intermediate_size"]), int(text["sliding_window"])
    return [
        LayerConfig(width, window_size=window if kind == sliding else None, qk_norm=QkNorm.WEIGHTED_BEFORE_ROPE)
        for kind in kinds
    ]


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, build: ParameterBuilder, layer: int) -> None:
        super().__init__()
        self.attention = Attention(build.at("self_attn"), config, layer)
        width = config.layers[layer].intermediate_size
        self.feed_forward = GatedFeedForward(build.at("mlp"), config.hidden_size, width)
        self.norms = nn.ModuleList(RmsNorm(build, name, config.hidden_size, config.rms_norm_eps) for name in _NORMS)


def _vision(vision: Mapping[str, Any], text_size: int) -> dict[str, tuple[int, ...]]:
    """SigLIP without its pooling head, and the projection to the text model."""
    size, width, patch = (int(vision[key]) for key in ("hidden_size", "intermediate_size", "patch_size"))
    num_positions = (int(vision["image_size"]) // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (size, int(vision.get("num_channels", 3)), patch, patch),
        "embeddings.patch_embedding.bias": (size,),
        "embeddings.position_embedding.weight": (num_positions, size),
        "post_layernorm.weight": (size,),
        "post_layernorm.bias": (size,),
        "multi_modal_projector.mm_input_projection_weight": (size, text_size),
        "multi_modal_projector.mm_soft_emb_norm.weight": (size,),
    }
    for layer in range(int(vision["num_hidden_layers"])):
        at = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (size, size), f"{at}.self_attn.{name}.bias": (size,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{name}.weight": (size,), f"{at}.{name}.bias": (size,)}
        shapes |= {f"{at}.mlp.fc1.weight": (width, size), f"{at}.mlp.fc1.bias": (width,)}
        shapes |= {f"{at}.mlp.fc2.weight": (size, width), f"{at}.mlp.fc2.bias": (size,)}
    return shapes
