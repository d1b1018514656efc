"""What deterministic mode asks of a model and a layout (docs/determinism.md). Pure, and free of torch."""

import math
from dataclasses import replace

from engine.config import Determinism, ParallelConfig
from engine.errors import InvalidOption, LayoutError
from engine.model_config import ModelConfig

_MOST_SHARDS = 8


def num_canonical_shards(model: ModelConfig) -> int:
    """In how many parts sums over divided dimensions are made under D2: 8, or the largest power of two below that
    divides the attention heads and every width."""
    sizes = [model.num_heads]
    for layer in model.layers:
        sizes.append(layer.moe.intermediate_size if layer.moe else layer.intermediate_size)
    return math.gcd(_MOST_SHARDS, *sizes)


def deterministic_layout(model: ModelConfig, parallel: ParallelConfig, determinism: Determinism) -> ParallelConfig:
    """``parallel`` under ``determinism``. Raises InvalidOption where the model's format, LayoutError where the layout
    does not allow it."""
    if determinism is Determinism.OFF:
        return parallel
    _check_formats(model)
    if parallel.balances_experts or parallel.num_redundant_experts:
        raise InvalidOption(
            "--deterministic does not serve experts that move or have copies, for sums over ranks follow their places; "
            "leave their balancing out, or --deterministic"
        )
    num_shards = 1
    if determinism is Determinism.D2:
        num_shards = num_canonical_shards(model)
        _check_degrees(parallel, num_shards)
    return replace(parallel, determinism=determinism, num_shards=num_shards)


def _check_formats(model: ModelConfig) -> None:
    if model.quantization is not None and model.quantization.rounds_inputs:
        raise InvalidOption(
            "--deterministic serves float32, bfloat16 and formats that quantize weights alone; this model's "
            "activations are rounded to int8 as well; leave --deterministic out, or use --quantization int4 or fp8"
        )


def _check_degrees(parallel: ParallelConfig, num_shards: int) -> None:
    if parallel.dp > 1:
        raise LayoutError(
            f"--deterministic d2 does not serve dp={parallel.dp}: experts' tokens are exchanged in another order; use "
            "dp=1, or d1"
        )
    if num_shards % parallel.tp:
        raise LayoutError(
            f"--deterministic d2 adds up in {num_shards} parts for this model, which tp={parallel.tp} does not divide; "
            "use a power of two up to that, or d1"
        )
