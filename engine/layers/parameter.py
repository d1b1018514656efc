"""Parameters that know their slice of the checkpoint, so that the loader needs to know nothing of parallelism.

Layers make their parameters through a ParameterBuilder, which notes for each which rectangle of which checkpoint tensor
goes where. On the meta device nothing is allocated, and the same notes serve the byte ledger.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from engine.parallel.mesh import Mesh


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


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of one checkpoint tensor, and where it goes.

    ``name``, ``shape``: the whole tensor in the checkpoint. ``start``: the rectangle's first index in each dimension.
    ``destination``: a view of a parameter, as large as the rectangle.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    destination: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in the destination's format."""
        return self.destination.numel() * self.destination.element_size()


class ParameterBuilder:
    """Makes one rank's parameters while its modules are constructed.

    ``slices`` grows with every parameter; ``at`` gives a builder for a submodule, which shares it.
    """

    def __init__(self, mesh: Mesh, dtype: torch.dtype, device: torch.device, prefix: str = "") -> None:
        self.mesh = mesh
        self.dtype = dtype
        self.device = device
        self.prefix = prefix
        self.slices: list[TensorSlice] = []

    def at(self, name: str) -> Self:
        """A builder whose tensors' names begin with this one's prefix and ``name``."""
        child = type(self)(self.mesh, self.dtype, self.device, f"{self.prefix}{name}.")
        child.slices = self.slices
        return child

    @property
    def tp(self) -> Split:
        """Division over the tensor-parallel ranks."""
        return Split(self.mesh.config.tp, self.mesh.tp_rank)

    def empty(self, *shape: int) -> torch.nn.Parameter:
        """An uninitialised parameter; ``fill`` says what it is loaded from."""
        return torch.nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)

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


def total_bytes(slices: Iterable[TensorSlice]) -> int:
    return sum(piece.num_bytes for piece in slices)
