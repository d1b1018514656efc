"""Llama 4's vision encoder, adapter and projector. The text model is served without them (engine.models.llama4)."""

from collections.abc import Mapping
from typing import Any


def vision_shapes(vision: Mapping[str, Any], text_size: int) -> dict[str, tuple[int, ...]]:
    """``vision``: ``vision_config`` of config.json; ``text_size``: the text model's hidden size."""
    size, width, patch = (int(vision[key]) for key in ("hidden_size", "intermediate_size", "patch_size"))
    num_patches = (int(vision["image_size"]) // patch) ** 2 + 1
    inner, outer = int(vision["projector_input_dim"]), int(vision["projector_output_dim"])
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (size,),
        "positional_embedding_vlm": (num_patches, size),
        "patch_embedding.linear.weight": (size, int(vision.get("num_channels", 3)) * patch**2),
        "vision_adapter.mlp.fc1.weight": (inner, width),
        "vision_adapter.mlp.fc2.weight": (outer, outer),
        "multi_modal_projector.linear_1.weight": (text_size, int(vision["vision_output_dim"])),
    }
    for name in ("layernorm_pre", "layernorm_post"):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for layer in range(int(vision["num_hidden_layers"])):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (size, size), f"{at}.self_attn.{name}.bias": (size,)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}.{name}.weight": (size,), f"{at}.{name}.bias": (size,)}
        shapes |= {f"{at}.mlp.fc1.weight": (width, size), f"{at}.mlp.fc1.bias": (width,)}
        shapes |= {f"{at}.mlp.fc2.weight": (size, width), f"{at}.mlp.fc2.bias": (size,)}
    return shapes
