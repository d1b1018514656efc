"""Checkpoints of random weights, for tests that look at bytes only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.config import Dtype
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh


def write_checkpoint(directory: Path, config: Mapping[str, Any]) -> None:
    """Of the unquantized model that ``config`` (config.json) describes, in float32; always the same."""
    (directory / "config.json").write_text(json.dumps(config))
    model = build_model(ModelConfig.from_directory(directory), Mesh(), Dtype.FLOAT32, torch.device("meta"))
    generator = torch.Generator().manual_seed(0)
    shapes = sorted({(piece.name, piece.shape) for piece in model.slices})
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    save_file(tensors, directory / "model.safetensors")
