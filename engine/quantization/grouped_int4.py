"""The one form in which every int4 format is held: two codes to a byte, and a scale for each group of inputs.

A weight is (code − zero) · scale, rounded once to the format of the activations. On CPUs without tile units bytes stand
in the order of torch's own product for bfloat16 activations, and few tokens are multiplied by that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import CheckpointError
from engine.kernels.encoded_linear import EncodedMatrix, Encoding
from engine.kernels.linear import has_tiles
from engine.parameter import ParameterBuilder
from engine.quantization import cpu_int4
from engine.quantization.division import Extent, inputs_of, require_whole
from engine.quantization.matrix import MatrixPart, WeightMatrix

CODES_PER_WORD = 8
"""Checkpoints pack eight codes into an int32."""
_MIDDLE = 8
"""The zero point of symmetric formats."""


@dataclass(frozen=True)
class Grouping:
    """``groups``: which of the matrix's groups this rank holds. ``size``: how many consecutive inputs share a scale (1
    where inputs are reordered)."""

    groups: Extent
    size: int


def grouping_of(build: ParameterBuilder, part: MatrixPart, group_size: int, reorders_inputs: bool = False) -> Grouping:
    """``group_size`` 0: a whole row. Raises LayoutError where the part cuts a group."""
    if reorders_inputs:
        # This rank's inputs may belong to any group.
        total = math.ceil(part.num_inputs / (group_size or part.num_inputs))
        return Grouping(Extent(total, 0, total), 1)
    if group_size in (0, part.num_inputs):
        return Grouping(Extent(1, 0, 1), part.local_inputs)
    require_whole(build.prefix + part.name, inputs_of(part), group_size, f"groups of {group_size} inputs")
    return Grouping(inputs_of(part).over(group_size), group_size)


@dataclass(frozen=True)
class Int4Rows:
    """One part's rows: views of the parameters. ``codes`` [n, in / 2] uint8, ``scales`` and uint8 ``zeros`` (None: 8
    everywhere) [n, groups], ``group_of_input`` [in] int32 (None: in order). ``pack``: from codes [n, in], one a byte,
    to their bytes."""

    pack: Callable[[torch.Tensor], torch.Tensor]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_of_input: torch.Tensor | None

    @property
    def destinations(self) -> list[torch.Tensor]:
        views = (self.codes, self.scales, self.zeros, self.group_of_input)
        return [view for view in views if view is not None]

    def fill(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> None:
        """``codes`` [n, in] uint8 from 0 to 15, one a byte; ``scales``, ``zeros`` as above."""
        self.codes.copy_(self.pack(codes))
        self.scales.copy_(scales)
        if self.zeros is not None:
            assert zeros is not None
            self.zeros.copy_(zeros)

    def fill_order(self, name: str, group_of_input: torch.Tensor) -> None:
        """``group_of_input`` as above, of the matrix ``name``. Raises CheckpointError where there is no such group."""
        assert self.group_of_input is not None
        low, high = (int(value) for value in torch.aminmax(group_of_input))
        last = self.scales.shape[1] - 1
        if low < 0 or high > last:
            raise CheckpointError(f"{name}: its inputs belong to groups {low} to {high}; there are groups 0 to {last}")
        self.group_of_input.copy_(group_of_input)


class GroupedInt4Matrix(WeightMatrix):
    """[out, in] in groups of inputs.

    ``scale_dtype``: of the scales. ``has_zeros``: whether groups have zero points. ``reorders_inputs``: inputs belong
    to groups in any order, in each part another.
    """

    def __init__(
        self,
        build: ParameterBuilder,
        parts: Sequence[MatrixPart],
        grouping: Grouping,
        scale_dtype: torch.dtype,
        has_zeros: bool = True,
        reorders_inputs: bool = False,
    ) -> None:
        super().__init__(build, parts)
        self._group_size = grouping.size
        self._sizes = [part.local_outputs for part in parts]
        self._is_blocked = not (reorders_inputs or has_tiles()) and cpu_int4.can_multiply(
            build.dtype, build.device, grouping.size, self._sizes
        )
        num_groups = grouping.groups.size
        self.codes = build.empty(self.num_outputs, self.num_inputs // 2, dtype=torch.uint8)
        self.scales = build.empty(self.num_outputs, num_groups, dtype=scale_dtype)
        self.zeros = build.empty(self.num_outputs, num_groups, dtype=torch.uint8) if has_zeros else None
        self.group_of_input = build.empty(len(parts), self.num_inputs, dtype=torch.int32) if reorders_inputs else None

    def part_rows(self) -> list[Int4Rows]:
        """Each part's own rows of the parameters, in order."""
        nothing = [None] * len(self._sizes)
        codes, scales = self.codes.split(self._sizes), self.scales.split(self._sizes)
        zeros = nothing if self.zeros is None else self.zeros.split(self._sizes)
        orders = nothing if self.group_of_input is None else self.group_of_input.unbind()
        return [Int4Rows(self.pack, *views) for views in zip(codes, scales, zeros, orders, strict=True)]

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [n, in] uint8 from 0 to 15 to the bytes [n, in / 2] of ``codes``."""
        return cpu_int4.pack_blocks(codes) if self._is_blocked else codes[:, 0::2] | codes[:, 1::2] << 4

    def encoded(self) -> EncodedMatrix | None:
        if self._is_blocked or self.group_of_input is not None:
            return None
        return EncodedMatrix(Encoding.INT4, self.num_inputs, self.codes, self._group_size, self.scales, self.zeros)

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._is_blocked and 0 < len(hidden) <= cpu_int4.MAX_TOKENS:
            return cpu_int4.multiply(hidden, self.codes, self.scales, self.zeros, self._group_size)
        return super().multiply(hidden)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        unpacked = cpu_int4.unpack_rows(self.codes, index) if self._is_blocked else unpack_nibbles(self.codes[index])
        codes = unpacked.view(torch.int8)
        scales = self.scales[index]
        zeros = None if self.zeros is None else self.zeros[index].view(torch.int8)
        if self.group_of_input is not None:
            scales = self._by_input(scales, index, self.group_of_input)
            zeros = None if zeros is None else self._by_input(zeros, index, self.group_of_input)
        grouped = codes.view(len(codes), -1, self._group_size)
        centred = grouped - (_MIDDLE if zeros is None else zeros.unsqueeze(-1))
        # Where scale and result are of one format, rounding is that of the multiplication.
        dtype = self.dtype if scales.dtype == self.dtype else torch.float32
        weights = centred.to(dtype).mul_(scales.unsqueeze(-1))
        return weights.view(codes.shape).to(self.dtype)

    def _by_input(
        self, values: torch.Tensor, index: slice | torch.Tensor, group_of_input: torch.Tensor
    ) -> torch.Tensor:
        """From what belongs to each group of the rows ``index`` [n, groups] to what belongs to each input [n, in].

        In float32, because columns of other formats are selected several times more slowly.
        """
        part_of_row = torch.arange(len(self._sizes)).repeat_interleave(torch.tensor(self._sizes))
        mine = part_of_row[index.cpu() if isinstance(index, torch.Tensor) else index]
        parts, counts = torch.unique_consecutive(mine, return_counts=True)
        runs = zip(parts.tolist(), values.float().split(counts.tolist()), strict=True)
        return torch.cat([rows.index_select(1, group_of_input[part]) for part, rows in runs])


def half_scales(dtype: torch.dtype) -> torch.dtype:
    """The format in which AWQ's and GPTQ's scales are held under activations of ``dtype``: float16, as these formats
    define it, though activations may be bfloat16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, m] uint8 to [n, 2 × m] uint8 from 0 to 15, the low half of a byte first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """[n, m] int32 to [n, 8 × m] uint8 from 0 to 15, the lowest four bits of a word first."""
    return unpack_nibbles(words.contiguous().view(torch.uint8))
