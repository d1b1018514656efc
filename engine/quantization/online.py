"""Quantizing a float checkpoint while it is loaded.

Each rank quantizes its own slice. Where a rank holds only some columns of a row, the row's scale there is that of these
columns: finer than one scale for the whole row, and so not quite the same for every tp.
"""

from collections.abc import Callable, Sequence

import torch

from engine.parameter import ParameterBuilder, SourceSlice
from engine.quantization.matrix import TILE_BYTES, MatrixPart

FLOAT_FORMATS = ("F32", "F16", "BF16")
"""What the checkpoint may hold, as safetensors names it."""
_ROW_BLOCK = 64
"""A tile has a multiple of so many rows: some formats keep as many together."""


def quantize_while_loading(
    build: ParameterBuilder,
    parts: Sequence[MatrixPart],
    destinations: Sequence[torch.Tensor],
    quantize: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> None:
    """Note that ``destinations``, whose dim 0 is the matrix's output row, come from the unquantized ``parts``.

    ``quantize``: rows [n, local in] in float32 to a tensor [n, ...] for each destination. It is given a tile of rows
    at a time, so that what is held besides is the slice of one part and one tile.
    """
    sizes = [part.local_outputs for part in parts]
    for part, *pieces in zip(parts, *(tensor.split(sizes) for tensor in destinations), strict=True):
        build.convert([float_source(build, part)], pieces, _Quantizing(quantize, pieces))


class _Quantizing:
    """One part's conversion. ``rows``: [out, in], or [1, in, out] from fused experts."""

    def __init__(
        self, quantize: Callable[[torch.Tensor], Sequence[torch.Tensor]], destinations: Sequence[torch.Tensor]
    ) -> None:
        self._quantize = quantize
        self._destinations = destinations

    def __call__(self, rows: torch.Tensor) -> None:
        if rows.dim() == 3:
            rows = rows[0].t()
        tile = max(1, TILE_BYTES // (rows.shape[1] * torch.float32.itemsize * _ROW_BLOCK)) * _ROW_BLOCK
        for first in range(0, rows.shape[0], tile):
            quantized = self._quantize(rows[first : first + tile].float())
            for destination, values in zip(self._destinations, quantized, strict=True):
                destination[first : first + tile] = values


def float_source(build: ParameterBuilder, part: MatrixPart) -> SourceSlice:
    if part.fused is None:
        shape, size = (part.num_outputs, part.num_inputs), (part.local_outputs, part.local_inputs)
        return build.source(f"{part.name}.weight", shape, part.start, size, FLOAT_FORMATS)
    size_3d = (1, part.local_inputs, part.local_outputs)
    return build.source(part.fused.tensor, part.fused.shape, part.fused.start, size_3d, FLOAT_FORMATS)
