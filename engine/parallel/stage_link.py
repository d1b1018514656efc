"""The seam between pipeline stages: hidden states from each rank of a stage to its counterpart in the next.

Hidden states are the same on all tp ranks of a stage. On one host each of them hands its counterpart the whole, which
costs one copy in memory and no meeting of the ranks. Between hosts each sends only its part of the columns, so that
every byte crosses the slow link once, and the receiving ranks put the parts together among themselves.
"""

from typing import Protocol

import torch

from engine.parallel.collectives import Collectives


class StageSender(Protocol):
    """To the next stage."""

    def send(self, hidden: torch.Tensor) -> None:
        """[T, n]. Returns when ``hidden`` may be overwritten; waits for the receiver only where the link's bounded
        buffers are full. Raises RankFailure where the receiver is lost, or takes nothing within the timeout."""
        ...


class StageReceiver(Protocol):
    """From the stage before, in the order of sending."""

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Raises RankFailure, naming the sender, where it is lost, or sends nothing within the timeout."""
        ...


class SlicedSender:
    """Of hidden states that all tp ranks hold, sends this rank's part of the columns; all where they do not divide."""

    def __init__(self, link: StageSender, tp: Collectives) -> None:
        self._link = link
        self._tp = tp

    def send(self, hidden: torch.Tensor) -> None:
        if hidden.shape[1] % self._tp.size:
            self._link.send(hidden)
        else:
            self._link.send(hidden.chunk(self._tp.size, dim=1)[self._tp.rank])


class SlicedReceiver:
    """Receives a part of the columns on each tp rank and gives all of them to all."""

    def __init__(self, link: StageReceiver, tp: Collectives) -> None:
        self._link = link
        self._tp = tp

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        if shape[1] % self._tp.size:
            return self._link.receive(shape, dtype)
        part = self._link.receive((shape[0], shape[1] // self._tp.size), dtype)
        return self._tp.all_gather_last_dim(part)
