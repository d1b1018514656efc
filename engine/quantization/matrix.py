"""The seam between layers and the ways to hold a weight matrix.

T tokens. A matrix is [out, in] as in ``y = x Wᵀ``; what a rank holds is [local out, local in].
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.kernels.encoded_linear import EncodedMatrix, can_decode, linear_encoded
from engine.kernels.linear import linear
from engine.parameter import WHOLE, ParameterBuilder, Split

TILE_BYTES = 2**20
"""How much of a quantized matrix is held in the activations' format at once, where there is no faster way: what a CPU's
own cache holds."""
_GPU_TILE_BYTES = 64 * TILE_BYTES
"""The same on a GPU, where each operation takes its time to begin."""


@dataclass(frozen=True)
class FloatSource:
    """Where the unquantized matrix stands in a checkpoint if not as [out, in] under ``<name>.weight``: a rectangle of
    the tensor ``tensor`` of ``shape`` from ``start``, [1, in, out] (fused experts, which are stored transposed)."""

    tensor: str
    shape: tuple[int, int, int]
    start: tuple[int, int, int]


@dataclass(frozen=True)
class MatrixPart:
    """One checkpoint matrix [num_outputs, num_inputs] and which part of it this rank holds.

    ``name``: without ``.weight``, below the builder's prefix. Only one of the splits may have a degree above 1.
    """

    name: str
    num_outputs: int
    num_inputs: int
    outputs: Split = WHOLE
    inputs: Split = WHOLE
    fused: FloatSource | None = None

    @property
    def local_outputs(self) -> int:
        return self.outputs.size(self.num_outputs)

    @property
    def local_inputs(self) -> int:
        return self.inputs.size(self.num_inputs)

    @property
    def start(self) -> tuple[int, int]:
        """(row, column) of the first element that this rank holds."""
        return self.outputs.start(self.num_outputs), self.inputs.start(self.num_inputs)


class WeightMatrix(nn.Module, abc.ABC):
    """Several parts with the same inputs, one after another along the outputs: [sum of local outputs, local inputs].

    Made from (ParameterBuilder, parts). Raises LayoutError, naming matrix and numbers, where a part cuts what the
    format keeps together.
    """

    def __init__(self, build: ParameterBuilder, parts: Sequence[MatrixPart]) -> None:
        super().__init__()
        self.num_outputs = sum(part.local_outputs for part in parts)
        self.num_inputs = parts[0].local_inputs
        self.dtype = build.dtype

    @abc.abstractmethod
    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows [n, in], by slice or by int64 indices [n], in the format of the activations."""

    def encoded(self) -> EncodedMatrix | None:
        """The matrix as the CPU's kernel for quantized weights takes it; None in formats that it does not know."""
        return None

    def int8_codes(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes [out, in] int8 and scales [out] float32, where ``forward`` rounds bfloat16 inputs to int8 as
        ``engine.kernels.linear.linear_int8`` does."""
        return None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]: by the kernel where it serves, which takes bfloat16 only."""
        encoded = self.encoded() if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" else None
        if encoded is not None and can_decode(encoded):
            return linear_encoded(hidden, encoded)
        return self.multiply(hidden)

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out] without the kernel. This one converts a tile of rows at a time."""
        return multiply_by_tiles(hidden, self.num_outputs, self.rows)


def multiply_by_tiles(
    hidden: torch.Tensor,
    num_outputs: int,
    rows: Callable[[slice], torch.Tensor],
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = linear,
) -> torch.Tensor:
    """[T, in] to [T, out] by a matrix [out, in], of which ``rows`` gives a tile at a time in ``hidden``'s format.
    ``product``: of [T, in] and a tile."""
    output = hidden.new_empty(*hidden.shape[:-1], num_outputs)
    tile_bytes = TILE_BYTES if hidden.device.type == "cpu" else _GPU_TILE_BYTES
    # In steps of 32 rows, which the CPU's tile units take together.
    tile = max(32, tile_bytes // (hidden.shape[-1] * hidden.element_size()) // 32 * 32)
    for first in range(0, num_outputs, tile):
        last = min(first + tile, num_outputs)
        output[..., first:last] = product(hidden, rows(slice(first, last)))
    return output
