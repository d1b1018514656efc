"""Published configs and published counts (tests/data/models), and small versions of them."""

import json
from pathlib import Path
from typing import Any

from cluster.licence import licence_of
from cluster.plan.source import FoundModel
from engine.models.shapes.registry import shapes_of

DATA = Path(__file__).parents[1] / "data" / "models"
PARAMS: dict[str, dict[str, Any]] = json.loads((DATA / "params.json").read_text())


def config_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return content


def found(name: str) -> FoundModel:
    config = config_of(name)
    return FoundModel(name, shapes_of(config), licence_of(config))


def with_text(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The text model's part changed, wherever it stands."""
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | changes}
    return config | changes
