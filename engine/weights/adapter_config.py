"""adapter_config.json as PEFT writes it: the little that is needed to serve the adapter, and what is refused."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
_Number = TypeVar("_Number", int, float)

_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "biases of lora_B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
}
"""Setting to what it asks for, where it is neither null nor false nor empty."""

_WITHOUT_EFFECT = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "use_rslora rank_pattern alpha_pattern target_modules target_parameters exclude_modules layers_to_transform "
    "layers_pattern lora_dropout bias init_lora_weights megatron_config megatron_core loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size ensure_weight_tying runtime_config".split()
)
"""Read below, or of training alone. Whatever else is set may change what the adapter computes."""

_INITS = frozenset([None, True, False, "gaussian", "eva", "orthogonal"])
"""Others change the base model's own weights before training."""


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and scale of an adapter's matrices. The patterns are PEFT's: a regular expression that a module's name, or
    a name's end that begins after a dot, matches in full."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """``module``: its name in the model that was trained; of a parameter, with the parameter's name."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def max_rank(self) -> int:
        return max([self.rank, *self.rank_pattern.values()])


def read_adapter_config(directory: str | Path, max_rank: int) -> AdapterConfig:
    """Raises AdapterError, naming the setting, where the adapter is of a kind that is not served, or its rank is above
    ``max_rank``."""
    path = Path(directory) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} does not exist; an adapter is a directory as PEFT saves it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise AdapterError(f"{path}: peft_type is {kind!r}; only LORA adapters are served")
    _refuse(path, content)
    config = _parse(path, content)
    if config.max_rank > max_rank:
        raise AdapterError(f"{path}: rank {config.max_rank} is above the {max_rank} that --max-lora-rank allows")
    return config


def _refuse(path: Path, content: Mapping[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if content.get(name):
            raise AdapterError(f"{path}: {name} is set: {what} cannot be served")
    if content.get("bias", "none") not in (None, "none"):
        raise AdapterError(f"{path}: bias is {content['bias']!r}: trained biases cannot be served; only 'none' can")
    init = content.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise AdapterError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model's weights; convert the adapter to a "
            "plain one first (PEFT's path_initial_model_for_weight_conversion)"
        )
    for name, value in content.items():
        if value and name not in _WITHOUT_EFFECT and name not in _REFUSED:
            raise AdapterError(f"{path}: {name} is set, which is not known here and may change what it computes")


def _parse(path: Path, content: Mapping[str, Any]) -> AdapterConfig:
    try:
        config = AdapterConfig(
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            use_rslora=bool(content.get("use_rslora")),
            rank_pattern={str(key): int(rank) for key, rank in (content.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (content.get("alpha_pattern") or {}).items()},
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise AdapterError(f"{path} is not as PEFT writes it: {error!r}") from error
    if min([config.rank, *config.rank_pattern.values()]) < 1 or not math.isfinite(
        sum([config.alpha, *config.alpha_pattern.values()])
    ):
        raise AdapterError(f"{path}: ranks must be at least 1 and alphas finite")
    return config


def _matching(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
