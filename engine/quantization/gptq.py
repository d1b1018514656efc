"""GPTQ's int4: weights stored as [in, out], inputs perhaps assigned to groups in any order (``desc_act``)."""

from collections.abc import Sequence
from functools import partial

import torch

from engine.parameter import ParameterBuilder
from engine.quantization.division import Extent, inputs_of, outputs_of, require_whole, source_of
from engine.quantization.grouped_int4 import (
    CODES_PER_WORD,
    GroupedInt4Matrix,
    Int4Rows,
    grouping_of,
    half_scales,
    unpack_words,
)
from engine.quantization.matrix import MatrixPart
from engine.quantization.online import FLOAT_FORMATS
from engine.quantization_config import MatrixFormat

_ONE_IN_EACH = 0x11111111


class GptqMatrix(GroupedInt4Matrix):
    """From ``qweight`` [in / 8, out], ``qzeros`` [groups, out / 8] int32, ``scales`` [groups, out], and ``g_idx`` [in]
    where inputs are reordered: then each rank holds the scales of all groups."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        grouping = grouping_of(build, parts[0], form.group_size, form.reorders_inputs)
        super().__init__(build, parts, grouping, half_scales(build.dtype), reorders_inputs=form.reorders_inputs)
        for part, rows in zip(parts, self.part_rows(), strict=True):
            self._convert_part(build, part, rows, grouping.groups, form)

    def _convert_part(
        self, build: ParameterBuilder, part: MatrixPart, rows: Int4Rows, groups: Extent, form: MatrixFormat
    ) -> None:
        name, inputs, outputs = part.name, inputs_of(part), outputs_of(part)
        require_whole(build.prefix + name, outputs, CODES_PER_WORD, "words of 8 outputs")
        require_whole(build.prefix + name, inputs, CODES_PER_WORD, "words of 8 inputs")
        sources = [
            source_of(build, f"{name}.qweight", (inputs.over(CODES_PER_WORD), outputs), ("I32",)),
            source_of(build, f"{name}.qzeros", (groups, outputs.over(CODES_PER_WORD)), ("I32",)),
            source_of(build, f"{name}.scales", (groups, outputs), FLOAT_FORMATS),
        ]
        if form.reorders_inputs:
            sources.append(source_of(build, f"{name}.g_idx", (inputs,), ("I32",)))
        convert = partial(_convert, build.prefix + name, rows, form.stores_zero_minus_one)
        build.convert(sources, rows.destinations, convert)


def _convert(
    name: str,
    rows: Int4Rows,
    stores_zero_minus_one: bool,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_of_input: torch.Tensor | None = None,
) -> None:
    # Its writers subtract one from each code of a word at once, so that a zero point of 0 borrows from its neighbour.
    # Added to the word as a whole, what was borrowed is given back.
    zeros = unpack_words(qzeros + _ONE_IN_EACH if stores_zero_minus_one else qzeros)
    rows.fill(unpack_words(qweight.t()), scales.t(), zeros.t())
    if group_of_input is not None:
        rows.fill_order(name, group_of_input)
