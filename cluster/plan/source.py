"""What is planned: from a directory, a config.json alone, a GGUF file, a hub id in the cache, or the embedded model.
No weights are read, nothing is downloaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from cluster.config import EMBEDDED_MODEL
from cluster.licence import Licence, licence_of
from cluster.replica.model_source import resolve
from engine.errors import CheckpointError
from engine.gguf.header import is_gguf
from engine.model_config import ModelConfig
from engine.models.shapes.model_shapes import ModelShapes
from engine.models.shapes.registry import served_shapes, shapes_of

_CONFIG = "config.json"


@dataclass(frozen=True)
class FoundModel:
    """``name``: for people."""

    name: str
    shapes: ModelShapes
    licence: Licence


def find_model(model: str, revision: str | None = None, quantization: str | None = None) -> FoundModel:
    """``quantization``: int8, int4 or fp8, of a float checkpoint while it is loaded.

    Raises CheckpointError or InvalidOption with the remedy.
    """
    found = _find(model, revision)
    if quantization is None:
        return found
    shapes = replace(found.shapes, config=found.shapes.config.quantized(quantization))
    return replace(found, shapes=shapes)


def _find(model: str, revision: str | None) -> FoundModel:
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return _from_config(path.stem if path.stem != "config" else path.absolute().parent.name, path, path)
    if model == EMBEDDED_MODEL or path.exists():
        directory = resolve(model, None).directory()
        if is_gguf(directory):
            return FoundModel(path.name, served_shapes(ModelConfig.from_directory(directory)), licence_of(directory))
        return _from_config(directory.name, directory / _CONFIG, directory)
    cached = _in_cache(model, revision or constants.DEFAULT_REVISION)
    if cached is None:
        raise CheckpointError(
            f"{model} is no directory, config.json or GGUF file here, and no model of that name is in the hub's cache; "
            f"give the path of its config.json"
        )
    return _from_config(model, cached, cached.parent)


def _from_config(name: str, config: Path, licensed: Path) -> FoundModel:
    return FoundModel(name, shapes_of(_read(config)), licence_of(licensed))


def _in_cache(model: str, revision: str) -> Path | None:
    try:
        found = try_to_load_from_cache(model, _CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
