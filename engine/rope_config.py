"""Rotary position embedding settings, as a checkpoint's config.json gives them. Torch-free."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError


class RopeType(enum.StrEnum):
    """How frequencies are stretched for contexts longer than the model was first trained on."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class RopeConfig:
    """Settings of one model's rotary embedding.

    ``interleaved``: adjacent pairs are rotated (Llama 4, whose weights are stored unpermuted); otherwise element i is
    paired with i + head_dim / 2 (Llama 1 to 3). ``original_max_positions`` is the context of pretraining.
    ``frequency_divisors``: by what each of the head_dim / 2 frequencies is divided, as GGUF files of Llama 3.1 have it;
    empty elsewhere. The remaining fields are those of the variant ``kind`` names, and None or their default elsewhere.
    """

    theta: float
    head_dim: int
    original_max_positions: int
    kind: RopeType = RopeType.DEFAULT
    interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] = ()

    @property
    def depends_on_prompt_length(self) -> bool:
        """Whether a token's frequencies depend on its prompt's length (dynamic NTK). If so, two prompts with a common
        prefix have different keys for it, and their KV blocks must not be shared."""
        return self.kind is RopeType.DYNAMIC


def parse_rope(hf: Mapping[str, Any], head_dim: int, default_theta: float, interleaved: bool) -> RopeConfig:
    """Read ``rope_parameters`` (transformers v5) or ``rope_scaling`` + ``rope_theta`` (v4).

    Raises CheckpointError on a variant that is not served.
    """
    values: dict[str, Any] = dict(hf.get("rope_scaling") or {})
    values.update(hf.get("rope_parameters") or {})
    name = values.get("rope_type") or values.get("type") or "default"
    if name not in list(RopeType):
        raise CheckpointError(f"config.json asks for rotary embedding {name!r}; served are {', '.join(RopeType)}")
    partial = values.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"config.json asks for partial_rotary_factor {partial}; only 1.0 is served")
    kind = RopeType(name)
    theta = values.get("rope_theta") or hf.get("rope_theta") or default_theta
    max_positions = int(hf["max_position_embeddings"])
    original = max_positions
    if kind in (RopeType.LLAMA3, RopeType.YARN):
        # Like transformers: a value beside the parameters wins over the one within.
        given = hf.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        original = int(given or max_positions)
    return RopeConfig(
        theta=float(theta),
        head_dim=head_dim,
        original_max_positions=original,
        kind=kind,
        interleaved=interleaved,
        factor=_factor(values, kind, max_positions / original),
        low_freq_factor=float(_required(values, "low_freq_factor")) if kind is RopeType.LLAMA3 else 1.0,
        high_freq_factor=float(_required(values, "high_freq_factor")) if kind is RopeType.LLAMA3 else 4.0,
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        attention_factor=values.get("attention_factor"),
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        truncate=bool(values.get("truncate", True)),
    )


def _factor(values: Mapping[str, Any], kind: RopeType, from_lengths: float) -> float:
    if kind is RopeType.DEFAULT:
        return 1.0
    if kind is RopeType.YARN and values.get("factor") is None:
        return from_lengths
    return float(_required(values, "factor"))


def _required(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        kind = values.get("rope_type") or values.get("type")
        raise CheckpointError(f"config.json: rotary embedding {kind!r} needs {key!r}, which is missing")
    return values[key]
