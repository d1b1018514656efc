"""The shape of Ollama's errors. Pure."""

from collections.abc import Mapping
from typing import Any


def ollama_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """``error`` is OpenAI's object; Ollama's clients know its message alone."""
    return {"error": error["message"]}
