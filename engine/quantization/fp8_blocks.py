"""float8 (e4m3) with a scale for each block of rows and columns: DeepSeek's form ("DeepSeek-V3 Technical Report",
arXiv 2412.19437, section 3.3) and compressed-tensors' ``block`` strategy."""

from collections.abc import Sequence

import torch

from engine.errors import LayoutError
from engine.kernels.encoded_linear import EncodedMatrix, Encoding
from engine.parameter import ParameterBuilder, Split
from engine.quantization.fp8 import decode_e4m3
from engine.quantization.matrix import MatrixPart, WeightMatrix
from engine.quantization_config import MatrixFormat


class Fp8BlockMatrix(WeightMatrix):
    """weight = code × its block's scale. ``codes``: [out, in] e4m3. ``scales``: [row blocks, column blocks] float32.

    Each part begins a block of its own, so the last block of a part may be cut short. Each weight is
    rounded to the activations' format.
    """

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart], form: MatrixFormat) -> None:
        super().__init__(build, parts)
        block_rows, block_columns = self._block_size = form.block_size
        for part in parts:
            _check(build, part, "rows", part.num_outputs, part.outputs, block_rows)
            _check(build, part, "columns", part.num_inputs, part.inputs, block_columns)
        num_blocks = [-(-part.local_outputs // block_rows) for part in parts]
        self.codes = build.empty(self.num_outputs, self.num_inputs, dtype=torch.float8_e4m3fn)
        self.scales = build.empty(sum(num_blocks), -(-self.num_inputs // block_columns), dtype=torch.float32)
        sizes = [part.local_outputs for part in parts]
        self._part_starts = [(sum(sizes[:i]), sum(num_blocks[:i])) for i in range(len(parts))]
        """First row and first block of each part."""
        self._is_regular = all(size % block_rows == 0 for size in sizes[:-1])
        """Whether blocks follow each other without one that is cut short in between."""
        for part, codes, scales in zip(parts, self.codes.split(sizes), self.scales.split(num_blocks), strict=True):
            build.fill(codes, f"{part.name}.weight", (part.num_outputs, part.num_inputs), part.start)
            shape = -(-part.num_outputs // block_rows), -(-part.num_inputs // block_columns)
            start = part.start[0] // block_rows, part.start[1] // block_columns
            build.fill(scales, f"{part.name}.{form.scale_name}", shape, start)

    def encoded(self) -> EncodedMatrix | None:
        if not self._is_regular:
            return None
        rows, columns = self._block_size
        return EncodedMatrix(
            Encoding.SCALED_FLOAT8, self.num_inputs, self.codes, columns, self.scales, rows_per_scale=rows
        )

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        scales = self.scales[self._blocks_of(index)]
        weights = decode_e4m3(self.codes[index]).float()
        width = self._block_size[1]
        in_blocks = self.num_inputs - self.num_inputs % width
        weights[:, :in_blocks].unflatten(1, (-1, width)).mul_(scales[:, : in_blocks // width, None])
        weights[:, in_blocks:].mul_(scales[:, -1:])
        return weights.to(self.dtype)

    def _blocks_of(self, index: slice | torch.Tensor) -> torch.Tensor:
        """The block of each row."""
        rows = torch.arange(self.num_outputs, device=self.codes.device)[index]
        blocks = rows
        for first_row, first_block in self._part_starts:
            blocks = torch.where(rows >= first_row, first_block + (rows - first_row) // self._block_size[0], blocks)
        return blocks


def _check(build: ParameterBuilder, part: MatrixPart, what: str, total: int, split: Split, block: int) -> None:
    """Raises LayoutError where a part of ``total`` rows or columns does not begin or end with a block."""
    if split.degree > 1 and (size := split.size(total)) % block:
        raise LayoutError(
            f"{build.prefix}{part.name}: {split.degree} ranks would hold {size} of its {total} {what} each, but its "
            f"scales belong to blocks of {block}; use a smaller tp"
        )
