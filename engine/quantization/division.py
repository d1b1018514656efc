"""Which part of a quantized matrix's tensors a rank reads, and whether that cuts what the format keeps together."""

from dataclasses import dataclass
from typing import Self

from engine.errors import CheckpointError, LayoutError
from engine.parameter import ParameterBuilder, SourceSlice
from engine.quantization.matrix import MatrixPart


@dataclass(frozen=True)
class Extent:
    """``size`` from ``start`` of a dimension of ``total``."""

    total: int
    start: int
    size: int

    def over(self, unit: int) -> Self:
        """The same where ``unit`` elements are stored as one; ``require_whole`` has seen to it that none is cut."""
        return type(self)(self.total // unit, self.start // unit, self.size // unit)


def outputs_of(part: MatrixPart) -> Extent:
    return Extent(part.num_outputs, part.start[0], part.local_outputs)


def inputs_of(part: MatrixPart) -> Extent:
    return Extent(part.num_inputs, part.start[1], part.local_inputs)


def source_of(
    build: ParameterBuilder,
    name: str,
    extents: tuple[Extent, ...],
    formats: tuple[str, ...],
    stored_shapes: tuple[tuple[int, ...], ...] = (),
) -> SourceSlice:
    """ParameterBuilder.source of the rectangle ``extents``, one for each dimension."""
    shape, start = tuple(extent.total for extent in extents), tuple(extent.start for extent in extents)
    size = tuple(extent.size for extent in extents)
    return build.source(name, shape, start, size, formats, stored_shapes)


def require_whole(name: str, extent: Extent, unit: int, what: str) -> None:
    """Check that the rank's share of the matrix ``name`` is a multiple of ``unit`` and so, all shares being equal, cuts
    none; ``what`` names the unit, such as "groups of 128 inputs".

    Raises CheckpointError where the whole matrix is no multiple, LayoutError, with the number of ranks over which it
    can be divided, where a share is none.
    """
    if extent.total % unit:
        raise CheckpointError(f"{name}: {extent.total} is no multiple of {unit} as {what} need; it is not served")
    if extent.size % unit:
        degree = extent.total // extent.size
        possible = max(n for n in range(1, degree) if (extent.total // unit) % n == 0)
        raise LayoutError(
            f"{name} cannot be divided over {degree} ranks: {extent.size} of {extent.total} each would cut {what}; "
            f"over {possible} it can"
        )
