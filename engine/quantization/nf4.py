"""bitsandbytes' NF4: four-bit codes of sixteen fixed values, scaled by the greatest magnitude of each block of 64
inputs; these scales may be quantized in turn ("QLoRA", arXiv 2305.14314)."""

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.kernels.encoded_linear import EncodedMatrix, Encoding
from engine.parameter import ParameterBuilder, SourceSlice
from engine.quantization.division import Extent, inputs_of, outputs_of, require_whole, source_of
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization.online import FLOAT_FORMATS
from engine.quantization_config import MatrixFormat

_BLOCK = 64
_NESTED_BLOCK = 256
_MAX_STATE_BYTES = 4096
_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution (appendix E of the paper), as float32."""


class Nf4Matrix(WeightMatrix):
    """weight = value of its code × its block's scale, in float32 and then rounded to the activations' format.

    ``codes``: [out, in / 2] uint8, two to a byte, the first in the high half. ``scales``: [out, in / 64] float32, also
    where the checkpoint has them quantized.
    """

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts)
        for part in parts:
            require_whole(build.prefix + part.name, inputs_of(part), _BLOCK, f"blocks of {_BLOCK} inputs")
        self.codes = build.empty(self.num_outputs, self.num_inputs // 2, dtype=torch.uint8)
        self.scales = build.empty(self.num_outputs, self.num_inputs // _BLOCK, dtype=torch.float32)
        sizes = [part.local_outputs for part in parts]
        for part, codes, scales in zip(parts, self.codes.split(sizes), self.scales.split(sizes), strict=True):
            convert = partial(_convert, build.prefix + part.name, part, codes, scales)
            build.convert(_sources(build, part, form.nested_scales), (codes, scales), convert)
        values = torch.tensor(_VALUES, device=build.device)
        # Both values of every byte, as the eight bytes of one number: looking these up is fastest.
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=-1)
        self.register_buffer("_pairs", pairs.view(torch.int64).flatten(), persistent=False)

    def encoded(self) -> EncodedMatrix:
        return EncodedMatrix(Encoding.NF4, self.num_inputs, self.codes, _BLOCK, self.scales)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        codes = self.codes[index]
        pairs = self.get_buffer("_pairs").index_select(0, codes.flatten().int())
        weights = pairs.view(torch.float32).view(len(codes), -1, _BLOCK)
        return weights.mul_(self.scales[index].unsqueeze(-1)).view(len(codes), -1).to(self.dtype)


def _sources(build: ParameterBuilder, part: MatrixPart, has_nested_scales: bool) -> list[SourceSlice]:
    """In the file the weights are one column, and the scales one row."""
    name, outputs, inputs = f"{part.name}.weight", outputs_of(part), inputs_of(part)
    num_weights = part.num_outputs * part.num_inputs
    num_blocks = num_weights // _BLOCK
    scales = (outputs, inputs.over(_BLOCK))
    sources = [
        source_of(build, name, (outputs, inputs.over(2)), ("U8",), ((num_weights // 2, 1),)),
        source_of(build, f"{name}.quant_map", (_whole(len(_VALUES)),), FLOAT_FORMATS),
        source_of(build, f"{name}.quant_state.bitsandbytes__nf4", (_whole(_MAX_STATE_BYTES),), ("U8",), ((-1,),)),
    ]
    if not has_nested_scales:
        return [*sources, source_of(build, f"{name}.absmax", scales, FLOAT_FORMATS, ((num_blocks,),))]
    return [
        *sources,
        source_of(build, f"{name}.absmax", scales, ("U8",), ((num_blocks,),)),
        source_of(build, f"{name}.nested_quant_map", (_whole(256),), FLOAT_FORMATS),
        source_of(build, f"{name}.nested_absmax", (_whole(math.ceil(num_blocks / _NESTED_BLOCK)),), FLOAT_FORMATS),
    ]


def _whole(size: int) -> Extent:
    return Extent(size, 0, size)


def _convert(
    name: str,
    part: MatrixPart,
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    quant_map: torch.Tensor,
    state_bytes: torch.Tensor,
    absmax: torch.Tensor,
    *nested: torch.Tensor,
) -> None:
    state = _parse_state(name, part, bytes(state_bytes.tolist()), bool(nested))
    if not torch.allclose(quant_map.float().cpu(), torch.tensor(_VALUES), atol=1e-6):
        raise CheckpointError(f"{name}: its quant_map is not that of NF4; other maps are not served")
    codes.copy_(weight)
    if not nested:
        scales.copy_(absmax)
        return
    nested_map, nested_absmax = nested
    blocks_per_row = part.num_inputs // _BLOCK
    rows = torch.arange(absmax.shape[0], device=absmax.device) + part.start[0]
    columns = torch.arange(absmax.shape[1], device=absmax.device) + part.start[1] // _BLOCK
    nested_block = (rows.unsqueeze(1) * blocks_per_row + columns) // _NESTED_BLOCK
    scales.copy_(
        nested_map.float()[absmax.int()].mul_(nested_absmax.float()[nested_block]).add_(state["nested_offset"])
    )


def _parse_state(name: str, part: MatrixPart, content: bytes, is_nested: bool) -> dict[str, Any]:
    """Of ``quant_state``. Raises CheckpointError where it describes another matrix than config.json does."""
    expected: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": _BLOCK,
        "shape": [part.num_outputs, part.num_inputs],
    }
    if is_nested:
        expected["nested_blocksize"] = _NESTED_BLOCK
    try:
        state = dict(json.loads(content))
        found = {key: state[key] for key in expected}
        state["nested_offset"] = float(state["nested_offset"]) if is_nested else 0.0
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name}: its quant_state cannot be read: {error!r}") from error
    if found != expected or not math.isfinite(state["nested_offset"]):
        raise CheckpointError(f"{name}: its quant_state says {found}; served is {expected}")
    return state
