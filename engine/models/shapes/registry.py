"""Whose shapes are known: all architectures that are served, and some that are not."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from engine.config_values import check_values, reading_config
from engine.errors import CheckpointError
from engine.model_config import ARCHITECTURES, ModelConfig
from engine.models.registry import make_model
from engine.models.shapes.llama4_vision import vision_shapes
from engine.models.shapes.model_shapes import ModelShapes
from engine.parameter import ParameterBuilder

_READERS = {
    "DeepseekV3ForCausalLM": "engine.models.shapes.deepseek_v3",
    "Gemma3ForCausalLM": "engine.models.shapes.gemma3",
    "Gemma3ForConditionalGeneration": "engine.models.shapes.gemma3",
    "MllamaForConditionalGeneration": "engine.models.shapes.mllama",
    "Phi3ForCausalLM": "engine.models.shapes.phi3",
}
"""Architecture that is not served → the module whose ``read_shapes`` reads its config.json."""


def shapes_of(config: Mapping[str, Any]) -> ModelShapes:
    """From the content of config.json. Raises CheckpointError where it is of no known architecture, or broken."""
    check_values(config)
    check_values(config.get("vision_config") or {}, "config.json: vision_config")
    architecture = str(next(iter(config.get("architectures") or [config.get("model_type")])))
    if architecture in _READERS:
        check_values(config.get("text_config") or {})
        with reading_config(architecture):
            shapes: ModelShapes = importlib.import_module(_READERS[architecture]).read_shapes(config)
            return shapes
    try:
        model = ModelConfig.from_hf(config)
    except CheckpointError as error:
        if architecture in ARCHITECTURES:
            raise
        raise CheckpointError(f"{error}; plan also knows {', '.join(sorted(_READERS))}") from error
    with reading_config(architecture):
        return served_shapes(model, config.get("vision_config") or {})


def served_shapes(model: ModelConfig, vision_config: Mapping[str, Any] | None = None) -> ModelShapes:
    """Of a model that is served. ``vision_config``: as in config.json, where it has one."""
    vision = vision_shapes(vision_config, model.hidden_size) if vision_config else {}
    return ModelShapes(model, _make, is_served=True, vision=vision)


def _make(config: ModelConfig, build: ParameterBuilder) -> nn.Module:
    model = make_model(config, build)
    assert isinstance(model, nn.Module)
    return model
