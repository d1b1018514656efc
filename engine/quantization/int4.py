"""Int4 as compressed-tensors packs it, and int4 from a float checkpoint."""

from collections.abc import Sequence
from functools import partial

import torch

from engine.errors import LayoutError
from engine.parameter import ParameterBuilder, SourceSlice
from engine.quantization.division import Extent, inputs_of, outputs_of, require_whole, source_of
from engine.quantization.grouped_int4 import (
    CODES_PER_WORD,
    GroupedInt4Matrix,
    Grouping,
    Int4Rows,
    grouping_of,
    unpack_words,
)
from engine.quantization.matrix import MatrixPart
from engine.quantization.online import FLOAT_FORMATS, quantize_while_loading
from engine.quantization_config import MatrixFormat

_ONLINE_GROUP_SIZES = (128, 64, 32)


class PackedInt4Matrix(GroupedInt4Matrix):
    """From ``weight_packed`` [out, in / 8] int32 and ``weight_scale`` [out, groups]; asymmetric also
    ``weight_zero_point`` [out / 8, groups] int32; reordered also ``weight_g_idx`` [in], as older writers have it."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        grouping = grouping_of(build, parts[0], form.group_size, form.reorders_inputs)
        super().__init__(build, parts, grouping, build.dtype, not form.symmetric, form.reorders_inputs)
        for part, rows in zip(parts, self.part_rows(), strict=True):
            sources = _packed_sources(build, part, rows, grouping.groups)
            build.convert(sources, rows.destinations, partial(_convert_packed, build.prefix + part.name, rows))


def _packed_sources(build: ParameterBuilder, part: MatrixPart, rows: Int4Rows, groups: Extent) -> list[SourceSlice]:
    name, inputs, outputs = part.name, inputs_of(part), outputs_of(part)
    require_whole(build.prefix + name, inputs, CODES_PER_WORD, "words of 8 inputs")
    sources = [
        source_of(build, f"{name}.weight_packed", (outputs, inputs.over(CODES_PER_WORD)), ("I32",)),
        source_of(build, f"{name}.weight_scale", (outputs, groups), FLOAT_FORMATS),
    ]
    if rows.zeros is not None:
        require_whole(build.prefix + name, outputs, CODES_PER_WORD, "words of 8 outputs")
        zeros = (outputs.over(CODES_PER_WORD), groups)
        sources.append(source_of(build, f"{name}.weight_zero_point", zeros, ("I32",)))
    if rows.group_of_input is not None:
        sources.append(source_of(build, f"{name}.weight_g_idx", (inputs,), ("I32",)))
    return sources


def _convert_packed(
    name: str, rows: Int4Rows, packed: torch.Tensor, scales: torch.Tensor, *others: torch.Tensor
) -> None:
    zeros = None if rows.zeros is None else unpack_words(others[0].t()).t()
    rows.fill(unpack_words(packed), scales, zeros)
    if rows.group_of_input is not None:
        rows.fill_order(name, others[-1])


class OnlineInt4Matrix(GroupedInt4Matrix):
    """From a float matrix: the weights of each group of 128 inputs (64 or 32 where 128 does not divide this rank's
    inputs) become the nearest of sixteen evenly spaced values from the group's least to its greatest, or to zero."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts, _online_grouping(build, parts[0]), build.dtype)
        assert self.zeros is not None
        quantize_while_loading(build, parts, (self.codes, self.scales, self.zeros), self._quantize)

    def _quantize(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scales, zeros = quantize_groups(weights, self.scales.shape[1], self.scales.dtype)
        return self.pack(codes), scales, zeros


def _online_grouping(build: ParameterBuilder, part: MatrixPart) -> Grouping:
    size = next((size for size in _ONLINE_GROUP_SIZES if part.local_inputs % size == 0), None)
    if size is None:
        raise LayoutError(
            f"{build.prefix}{part.name} cannot be quantized to int4: none of the group sizes "
            f"{', '.join(str(size) for size in _ONLINE_GROUP_SIZES)} divides its {part.local_inputs} inputs on each of "
            f"{part.inputs.degree} ranks; use fewer ranks, or int8 or fp8"
        )
    return Grouping(inputs_of(part).over(size), size)


def quantize_groups(
    weights: torch.Tensor, num_groups: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, in] float32 to codes [n, in] and zero points [n, groups] uint8, and scales [n, groups] of ``scale_dtype``, as
    codes, scales, zero points."""
    grouped = weights.unflatten(1, (num_groups, -1))
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    scales = ((high - low) / 15).to(scale_dtype)
    # A group of zeros alone has scale 0.
    divisors = scales.float().masked_fill_(scales == 0, 1)
    zeros = (-low / divisors).round_().clamp_(0, 15)
    codes = (grouped / divisors.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 15)
    return codes.to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8)
