"""Under which licence a checkpoint says it stands. A reading of its files, shown to the user; nothing is decided by it,
and it is no advice.

What is looked at, the first that tells wins: the first lines of its LICENSE, the front matter of its README.md, the
first lines of its USE_POLICY and NOTICE, and the shapes in its config.json, where only one family has them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import CheckpointError
from engine.gguf.header import is_gguf
from engine.gguf.model import read_model

UNKNOWN = "unknown"
_MAX_READ_BYTES = 65_536
_MAX_NAME_CHARS = 120
_FIRST_LINES = 3
"""Titles stand there; further down a licence may name others."""

_ACTIVE_USERS = (
    "an organisation whose products had more than 700 million monthly active users when the model was released "
    "needs a licence of Meta's own"
)
_EUROPE = (
    "the licence withholds the rights to this generation's multimodal models from individuals and companies domiciled "
    "in the European Union"
)


@dataclass(frozen=True)
class Licence:
    """``name``: as its publisher writes it, or "unknown". ``source``: where that was found, empty if nowhere.
    ``attribution``: the line that the licence asks to be shown, if any. ``notices``: what may matter to who serves it.
    """

    name: str = UNKNOWN
    source: str = ""
    attribution: str | None = None
    notices: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for a terminal."""
        source = f" (by {self.source})" if self.source else ""
        attribution = f"; {self.attribution}" if self.attribution else ""
        return f"licence: {self.name}{source}{attribution}"


@dataclass(frozen=True)
class _Terms:
    """``id``: the hub's name for the licence. ``pattern``: of its title, or of a policy's that belongs to it."""

    id: str
    name: str
    pattern: str
    attribution: str | None = None
    notices: tuple[str, ...] = ()
    multimodal_notices: tuple[str, ...] = field(default=())


def _llama(generation: str, attribution: str | None, *multimodal_notices: str) -> _Terms:
    """Meta's Community License of one generation, whose texts all begin alike."""
    title = rf"\bllama[ -]{re.escape(generation)}(?![.\d]) (version release|community licen[sc]e|acceptable use)"
    name = f"Llama {generation} Community License"
    return _Terms(f"llama{generation}", name, title, attribution, (_ACTIVE_USERS,), multimodal_notices)


_TERMS = (
    _llama("2", None),
    _llama("3", "Built with Meta Llama 3"),
    _llama("3.1", "Built with Llama"),
    _llama("3.2", "Built with Llama", _EUROPE),
    _llama("3.3", "Built with Llama"),
    _llama("4", "Built with Llama", _EUROPE),
    _Terms("apache-2.0", "Apache-2.0", r"^apache licen[sc]e"),
    _Terms("mit", "MIT", r"^(the )?mit licen[sc]e"),
    _Terms("gemma", "Gemma Terms of Use", r"^gemma (terms of use|is provided under)"),
)
_BY_ID = {terms.id: terms for terms in _TERMS}
_LLAMA_3_1_OR_3_3 = _Terms("", "Llama 3.1 or Llama 3.3 Community License", "(?!)", "Built with Llama", (_ACTIVE_USERS,))
"""The 70B of the two generations have the same shapes."""


def licence_of(checkpoint: str | Path | Mapping[str, Any]) -> Licence:
    """The licence of a checkpoint's directory, of a GGUF file, of one config.json, or of the content of one. Pure but
    for reading.

    A file that cannot be read or parsed tells nothing; where nothing tells, the name is "unknown".
    """
    if isinstance(checkpoint, Mapping):
        return _from_config(checkpoint)
    path = Path(checkpoint)
    if is_gguf(path):
        return _from_gguf(path)
    if not path.is_dir():
        return _from_config(_read_config(path))
    config = _read_config(path / "config.json")
    by_shape = _terms_of_shape(config)
    for names, read in (
        (("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"), _by_title),
        (("README.md",), _by_front_matter),
        (("USE_POLICY.md", "USE_POLICY", "NOTICE", "NOTICE.txt"), _by_title),
    ):
        for name in names:
            terms = read(_head(path / name))
            if terms is not None:
                return _licence(terms, name, config, by_shape)
    return _from_config(config)


def _from_gguf(path: Path) -> Licence:
    """The hub's name for it in the metadata, else the shapes."""
    try:
        model = read_model(path)
    except CheckpointError:
        return Licence()
    metadata, rope = model.header.metadata, model.config["rope_parameters"]
    if model.rope_divisors:
        rope = rope | {"factor": max(model.rope_divisors)}
    by_shape = _terms_of_shape(dict(model.config) | {"rope_parameters": rope})
    for key in ("general.license", "general.license.name"):
        if terms := _by_name(metadata.get(key)):
            return _licence(terms, f"{key} in its metadata", model.config, by_shape)
    return _licence(by_shape, "its shapes", model.config, by_shape) if by_shape else Licence()


def _from_config(config: Mapping[str, Any]) -> Licence:
    terms = _terms_of_shape(config)
    return _licence(terms, "the shapes in config.json", config, terms) if terms else Licence()


def _licence(terms: _Terms, source: str, config: Mapping[str, Any], by_shape: _Terms | None) -> Licence:
    notices = terms.notices
    if config.get("vision_config"):
        notices += terms.multimodal_notices
    if by_shape is not None and by_shape.attribution and not terms.attribution:
        notices += (f"config.json has the shapes of a model under the {by_shape.name}, which may apply too",)
    return Licence(terms.name, source, terms.attribution, notices)


def _by_title(text: str) -> _Terms | None:
    lines = [re.sub(r"[#*_=\s]+", " ", line).strip() for line in text.splitlines()]
    title = " ".join([line for line in lines if line][:_FIRST_LINES])
    for terms in _TERMS:
        if re.search(terms.pattern, title, re.IGNORECASE):
            return terms
    return None


def _by_front_matter(text: str) -> _Terms | None:
    """The hub's model card: YAML between two lines of dashes, with ``license`` and, if that is "other",
    ``license_name``."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not match:
        return None
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None
    if not isinstance(card, dict):
        return None
    name = card.get("license")
    if name == "other":
        name = card.get("license_name")
    return _by_name(name)


def _by_name(name: Any) -> _Terms | None:
    """From the hub's name for a licence, or another's."""
    if not isinstance(name, str) or not name.isprintable() or name.lower() in ("", "other", UNKNOWN):
        return None
    return _BY_ID.get(name.lower()) or _Terms("", name[:_MAX_NAME_CHARS], "(?!)")


def _terms_of_shape(config: Mapping[str, Any]) -> _Terms | None:
    """Vocabulary and architecture together name a family; a shape that several publishers use names none."""
    text = {**config, **_mapping(config.get("text_config"))}
    model_type, vocab_size = str(text.get("model_type")), text.get("vocab_size")
    architectures = str(config.get("architectures"))
    if vocab_size == 202_048 and model_type.startswith("llama4"):
        return _BY_ID["llama4"]
    if vocab_size == 128_256 and model_type.startswith("mllama"):
        return _BY_ID["llama3.2"]
    if vocab_size == 128_256 and model_type == "llama":
        return _llama_3(text)
    if model_type == "llama" and _is_llama_2(text):
        return _BY_ID["llama2"]
    if vocab_size == 100_352 and model_type == "phi3":
        return _BY_ID["mit"]
    if "Gemma3" in architectures or model_type.startswith("gemma3"):
        return _BY_ID["gemma"]
    if vocab_size == 151_936 and model_type in ("qwen3", "qwen3_moe"):
        return _BY_ID["apache-2.0"]
    if model_type == "mixtral" and text.get("hidden_size") in (4096, 6144) and vocab_size in (32_000, 32_768):
        return _BY_ID["apache-2.0"]
    return None


def _llama_3(text: Mapping[str, Any]) -> _Terms:
    """3 has no scaled rotation; 3.2 scales by 32, 3.1 and 3.3 by 8. Of 3.3 there is only the 70B."""
    scaling = _mapping(text.get("rope_scaling")) or _mapping(text.get("rope_parameters"))
    factor = scaling.get("factor")
    if factor is None:
        return _BY_ID["llama3"]
    if factor == 32:
        return _BY_ID["llama3.2"]
    return _LLAMA_3_1_OR_3_3 if text.get("hidden_size") == 8192 else _BY_ID["llama3.1"]


def _is_llama_2(text: Mapping[str, Any]) -> bool:
    """Llama 2 and Code Llama by all their sizes together: their vocabulary is everybody's."""
    sizes = tuple(text.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    is_code = (
        text.get("max_position_embeddings") == 16_384
        and _rope_theta(text) == 1e6
        and text.get("vocab_size") in (32_000, 32_016)
    )
    is_chat = text.get("max_position_embeddings") == 4096 and text.get("vocab_size") == 32_000
    chat_sizes = ((4096, 32, 11008), (5120, 40, 13824), (8192, 80, 28672))
    return (is_chat and sizes in chat_sizes) or (is_code and sizes in (*chat_sizes, (8192, 48, 22016)))


def _rope_theta(text: Mapping[str, Any]) -> Any:
    return text.get("rope_theta") or _mapping(text.get("rope_parameters")).get("rope_theta")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _head(path: Path) -> str:
    """The first bytes of a text file; empty where there is none or it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_READ_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff")
    except OSError:
        return ""
