"""The collectives seam: what layers may ask of the ranks that they share work with."""

from typing import Protocol

import torch


class Collectives(Protocol):
    """Collective operations over one axis of the mesh. Every rank of the axis calls the same ones in the same order.

    A dead or stuck peer raises engine.errors.RankFailure within the axis's timeout.
    """

    @property
    def size(self) -> int:
        """Ranks on the axis."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place on the axis, 0 ≤ rank < size."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the axis; may work in place and returns the result. Any shape, float32 or bfloat16."""
        ...

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Concatenate [..., n] tensors along the last dim on axis rank 0 ([..., n × size]); None on the others."""
        ...

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``gather_last_dim``, for all."""
        ...

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Axis rank 0's values, in place, on all."""
        ...


class LocalCollectives:
    """An axis of one rank: nothing to do."""

    size = 1
    rank = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
