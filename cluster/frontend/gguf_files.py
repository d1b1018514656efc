"""What a GGUF file's metadata says in place of the JSON files of a model directory."""

from pathlib import Path
from typing import Any

from engine.gguf.model import read_model
from engine.gguf.special_tokens import token_id

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys below ``general.sampling``, and generation_config.json's words for them."""
_NAMED_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_TEMPLATE = "tokenizer.chat_template"


def gguf_as_json(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The contents of config.json, generation_config.json and tokenizer_config.json. Raises CheckpointError."""
    model = read_model(path)
    metadata = model.header.metadata
    sampling = {name: metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    tokenizer: dict[str, Any] = {}
    for key, name in _NAMED_TOKENS.items():
        number = token_id(metadata, key)
        if number is not None and 0 <= number < len(tokens):
            tokenizer[name] = tokens[number]
    templates = {key: value for key, value in metadata.items() if key.startswith(f"{_TEMPLATE}.")}
    if _TEMPLATE in metadata:
        named = [{"name": key.removeprefix(f"{_TEMPLATE}."), "template": value} for key, value in templates.items()]
        tokenizer["chat_template"] = [{"name": "default", "template": metadata[_TEMPLATE]}, *named]
    return dict(model.config), {name: value for name, value in sampling.items() if value is not None}, tokenizer
