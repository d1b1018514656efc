"""An axis of the mesh as layers hold it: it lasts, and the group behind it is another one in each formation."""

import torch

from engine.parallel.collectives import Collectives, ReceivedRows


class LastingAxis:
    """See Collectives; ``group`` does the work."""

    def __init__(self, group: Collectives) -> None:
        self.group = group
        self.size, self.rank = group.size, group.rank

    def form(self, group: Collectives) -> None:
        """From now on ``group``, which has the same size and rank, does the work."""
        assert (group.size, group.rank) == (self.size, self.rank), "a rank keeps its place for life"
        self.group = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(tensor)

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self.group.gather_last_dim(tensor)

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.group.all_gather_last_dim(tensor)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.group.broadcast(tensor)

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        return self.group.post_rows(rows, counts, expected)
