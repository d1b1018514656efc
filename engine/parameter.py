"""Parameters that know their slice of the checkpoint, so that the loader needs to know nothing of parallelism.

Layers make their parameters through a ParameterBuilder, which notes for each which rectangle of which checkpoint tensor
goes where, or from which rectangles it is computed. On the meta device nothing is allocated, and the same notes serve
the byte ledger.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from engine.kernels.huge_pages import advise_huge_pages
from engine.parallel.mesh import Mesh
from engine.quantization_config import MatrixFormat, QuantizationConfig


@dataclass(frozen=True)
class Split:
    """Division of a dimension into ``degree`` equal parts, of which this rank has number ``index``."""

    degree: int = 1
    index: int = 0

    def size(self, total: int) -> int:
        """Length of this rank's part. ``total`` must be divisible: ``validate_layout`` has seen to that."""
        assert total % self.degree == 0, f"{total} is not divisible by {self.degree}"
        return total // self.degree

    def start(self, total: int) -> int:
        return self.index * self.size(total)


WHOLE = Split()


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of one checkpoint tensor, and where it goes.

    ``name``, ``shape``: the whole tensor in the checkpoint. ``start``: the rectangle's first index in each dimension.
    ``destination``: a view of a parameter, as large as the rectangle. Floats are converted to its format, other formats
    must be the destination's own.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    destination: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in the destination's format."""
        return self.destination.numel() * self.destination.element_size()


@dataclass(frozen=True)
class SourceSlice:
    """A rectangle of one checkpoint tensor that is read into scratch memory, in the file's own format.

    ``name``: the whole name. ``shape``: of the whole tensor. ``start``, ``size``: the rectangle. ``formats``: which
    formats, as safetensors names them, are allowed. ``stored_shapes``: shapes that the file may have instead of
    ``shape``, of as many elements in the same order (a flat [n / 2, 1] for [rows, columns / 2]); (-1,): the tensor has
    one dimension and is read whole, ``shape`` is the most that it may have.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    formats: tuple[str, ...]
    stored_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Conversion:
    """Parameters that are computed from checkpoint tensors instead of copied.

    The loader reads all ``sources``, calls ``convert`` with them in this order, and frees them: what is held besides
    the parameters is one conversion's sources and what ``convert`` itself needs. ``destinations``: the parameters, or
    views of them, that ``convert`` fills.
    """

    sources: tuple[SourceSlice, ...]
    destinations: tuple[torch.Tensor, ...]
    convert: Callable[..., None]

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters that are filled."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.destinations)


class ParameterBuilder:
    """Makes one rank's parameters while its modules are constructed.

    ``slices`` and ``conversions`` grow with the parameters; ``at`` gives a builder for a submodule, which shares them.
    ``dtype``: of activations and of unquantized weights. ``prefix``: of the names of the tensors in the checkpoint.
    """

    def __init__(
        self,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        prefix: str = "",
        quantization: QuantizationConfig | None = None,
    ) -> None:
        self.mesh = mesh
        self.dtype = dtype
        self.device = device
        self.prefix = prefix
        self.quantization = quantization
        self.slices: list[TensorSlice] = []
        self.conversions: list[Conversion] = []

    def at(self, name: str) -> Self:
        """A builder whose tensors' names begin with this one's prefix and ``name``."""
        child = type(self)(self.mesh, self.dtype, self.device, f"{self.prefix}{name}.", self.quantization)
        child.slices, child.conversions = self.slices, self.conversions
        return child

    def apart(self) -> Self:
        """The same with notes of its own, for parameters that are made later."""
        return type(self)(self.mesh, self.dtype, self.device, self.prefix, self.quantization)

    @property
    def tp(self) -> Split:
        """Division over the tensor-parallel ranks."""
        return Split(self.mesh.config.tp, self.mesh.tp_rank)

    def format_of(self, name: str) -> MatrixFormat | None:
        """How the matrix ``prefix + name`` (without ``.weight``) is held; None: not quantized."""
        return None if self.quantization is None else self.quantization.format_of(self.prefix + name)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """An uninitialised parameter, by default of the builder's dtype; ``fill`` or ``convert`` says what it is
        loaded from."""
        values = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        advise_huge_pages(values)
        return torch.nn.Parameter(values, requires_grad=False)

    def fill(self, destination: torch.Tensor, name: str, shape: tuple[int, ...], start: tuple[int, ...]) -> None:
        """Note that ``destination`` is the rectangle at ``start`` of checkpoint tensor ``prefix + name``."""
        assert len(shape) == len(start) == destination.dim()
        assert all(s + n <= whole for s, n, whole in zip(start, destination.shape, shape, strict=True))
        self.slices.append(TensorSlice(self.prefix + name, shape, start, destination.detach()))

    def whole(self, name: str, *shape: int) -> torch.nn.Parameter:
        """A parameter that every rank holds in full."""
        parameter = self.empty(*shape)
        self.fill(parameter, name, shape, (0,) * len(shape))
        return parameter

    def source(
        self,
        name: str,
        shape: tuple[int, ...],
        start: tuple[int, ...],
        size: tuple[int, ...],
        formats: tuple[str, ...],
        stored_shapes: tuple[tuple[int, ...], ...] = (),
    ) -> SourceSlice:
        """The rectangle of ``size`` at ``start`` of checkpoint tensor ``prefix + name``, for ``convert``."""
        assert len(shape) == len(start) == len(size)
        assert all(s + n <= whole for s, n, whole in zip(start, size, shape, strict=True))
        return SourceSlice(self.prefix + name, shape, start, size, formats, stored_shapes)

    def convert(
        self,
        sources: Iterable[SourceSlice],
        destinations: Iterable[torch.Tensor],
        function: Callable[..., None],
    ) -> None:
        """Note that ``function(*tensors of sources)`` fills ``destinations``."""
        self.conversions.append(Conversion(tuple(sources), tuple(tensor.detach() for tensor in destinations), function))


def total_bytes(pieces: Iterable[TensorSlice | Conversion]) -> int:
    return sum(piece.num_bytes for piece in pieces)
