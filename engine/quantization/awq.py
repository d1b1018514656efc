"""AutoAWQ's int4 ("gemm"): weights stored as [in, out], with a zero point for each group."""

from collections.abc import Sequence
from functools import partial

import torch

from engine.parameter import ParameterBuilder
from engine.quantization.division import inputs_of, outputs_of, require_whole, source_of
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

_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]
"""In which four bits of a word, from the lowest, each of its eight outputs stands."""


class AwqMatrix(GroupedInt4Matrix):
    """From ``qweight`` [in, out / 8], ``qzeros`` [groups, out / 8] int32 and ``scales`` [groups, out]."""

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        grouping = grouping_of(build, parts[0], form.group_size)
        super().__init__(build, parts, grouping, half_scales(build.dtype))
        for part, rows in zip(parts, self.part_rows(), strict=True):
            name, outputs = part.name, outputs_of(part)
            require_whole(build.prefix + name, outputs, CODES_PER_WORD, "words of 8 outputs")
            words = outputs.over(CODES_PER_WORD)
            sources = (
                source_of(build, f"{name}.qweight", (inputs_of(part), words), ("I32",)),
                source_of(build, f"{name}.qzeros", (grouping.groups, words), ("I32",)),
                source_of(build, f"{name}.scales", (grouping.groups, outputs), FLOAT_FORMATS),
            )
            build.convert(sources, rows.destinations, partial(_convert, rows))


def _convert(rows: Int4Rows, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> None:
    rows.fill(_unpack(qweight).t(), scales.t(), _unpack(qzeros).t())


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """[n, m] int32 to [n, 8 × m] uint8, the outputs in their own order."""
    by_word: torch.Tensor = unpack_words(words).unflatten(1, (-1, CODES_PER_WORD))
    return by_word[..., _POSITIONS].flatten(1)
