"""The collectives seam: what layers may ask of the ranks that they share work with."""

from collections.abc import Callable
from typing import Protocol

import torch

ReceivedRows = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Waits for rows that are under way; to be called once. Gives the rows [M, W], ordered by sender, and how many came
from each rank: [size] int64 on the CPU."""


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

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        """All-to-all of rows: any number, also none, from every rank to every rank.

        Args:
            rows: [N, W] in any format, ordered by receiver; not to be changed before the answer has come.
            counts: [size] int64 on the CPU, how many go to each rank.
            expected: [size] int64 on the CPU, how many come from each, where that is known.

        Returns at once; no other operation may begin on the axis before the answer is called.
        """
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

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        return lambda: (rows, counts)
