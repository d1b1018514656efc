"""What the front end reads of a checkpoint: small JSON files or a GGUF file's metadata, never weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.frontend.gguf_files import gguf_as_json
from cluster.licence import Licence, licence_of
from engine.errors import CheckpointError, InvalidRequest
from engine.gguf.header import is_gguf
from engine.request import SamplingParams

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ModelFiles:
    """Facts of one checkpoint.

    ``vocab_size`` is the model's (config.json), which can be larger than the tokenizer's. ``eos_ids`` end a sequence.
    ``named_tokens`` are what templates know as ``bos_token`` and so on. ``sampling_defaults`` come from
    generation_config.json and hold only what stands there. ``tool_template`` is the one for requests with tools, where
    a checkpoint has one of its own for these. ``config`` is config.json's, or its part about text;
    ``architectures`` stand outside of that.
    """

    path: Path
    vocab_size: int
    eos_ids: tuple[int, ...]
    named_tokens: Mapping[str, str]
    chat_template: str | None
    tool_template: str | None
    sampling_defaults: Mapping[str, float]
    licence: Licence
    config: Mapping[str, Any]
    architectures: tuple[str, ...]


def read_model_files(path: Path) -> ModelFiles:
    """Raises CheckpointError where a file is missing or is not what it should be."""
    if is_gguf(path):
        config, generation, tokenizer = gguf_as_json(path)
    else:
        config = _read_object(path / "config.json", required=True)
        generation = _read_object(path / "generation_config.json")
        tokenizer = _read_object(path / "tokenizer_config.json")
    text_config = config.get("text_config") or config
    vocab_size = text_config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{path / 'config.json'} has no vocab_size")
    return ModelFiles(
        path=path,
        vocab_size=vocab_size,
        eos_ids=_eos_ids(generation, text_config, config),
        named_tokens=_named_tokens(path, tokenizer),
        chat_template=_chat_template(path, tokenizer),
        tool_template=_tool_template(path, tokenizer),
        sampling_defaults=_sampling_defaults(generation),
        licence=licence_of(path),
        config=text_config,
        architectures=tuple(map(str, config.get("architectures") or ())),
    )


def _read_object(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing; a model directory in Hugging Face form has it")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _eos_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """What any of the files says: there are checkpoints in which one of them forgets the end of a turn or of a call."""
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def _named_tokens(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer_config.json's, else (older checkpoints) special_tokens_map.json's."""
    merged = _read_object(path / "special_tokens_map.json") | {
        key: value for key, value in tokenizer.items() if value is not None
    }
    named: dict[str, str] = {}
    for key in _NAMED_TOKENS:
        value = merged.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            named[key] = value
    return named


def _chat_template(path: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """chat_template.jinja goes before the entry in tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    return _read_text(file) if file.is_file() else _templates(tokenizer).get("default")


def _tool_template(path: Path, tokenizer: Mapping[str, Any]) -> str | None:
    file = path / "additional_chat_templates" / "tool_use.jinja"
    return _read_text(file) if file.is_file() else _templates(tokenizer).get("tool_use")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _templates(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """By name, as tokenizer_config.json has them: one, or a list of objects. Raises CheckpointError."""
    given = tokenizer.get("chat_template")
    if given is None:
        return {}
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
    try:
        templates = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, LookupError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise CheckpointError(
            "tokenizer_config.json: chat_template must be a text, or a list of objects with the texts name and template"
        )
    return templates


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """A model that says ``do_sample: false`` is meant to be greedy. Raises CheckpointError where a value is no number,
    or out of range."""
    defaults = {key: generation[key] for key in _SAMPLING_DEFAULTS if generation.get(key) is not None}
    if generation.get("do_sample") is False:
        defaults = {"temperature": 0.0} | {key: defaults[key] for key in defaults if key == "repetition_penalty"}
    if defaults.get("top_k") == -1:
        defaults["top_k"] = 0
    for key, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float):
            raise CheckpointError(f"generation_config.json: {key} is {value!r}; it must be a number")
    try:
        SamplingParams(max_tokens=1, **defaults).validate(1)
    except InvalidRequest as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    return defaults
