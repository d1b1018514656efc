"""NCCL: how groups are made, and hidden states between the GPUs of neighbouring stages."""

import datetime
import threading
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import RankFailure
from engine.progress import AxisMarks, Operation

_MAX_UNFINISHED = 4
"""Sends whose tensors are kept while the receiver has not taken them; then the next one waits on the GPU."""


def nccl_group(store: dist.Store, rank: int, size: int, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)


class NcclLink:
    """One direction: the pair's rank 0 sends, its rank 1 receives. See StageSender and StageReceiver.

    NCCL works on a stream of its own, so both overlap with what is computed, in order. Its watchdog ends a rank whose
    peer is silent.
    """

    def __init__(
        self, store: dist.Store, rank: int, peer: int, device: torch.device, timeout_s: float, marks: AxisMarks
    ) -> None:
        self._group = nccl_group(store, rank, 2, timeout_s)
        self._peer = peer
        self._marks = marks
        self._device = device
        self._unfinished: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, hidden: torch.Tensor) -> None:
        # A copy, so that the caller's may be overwritten while this one is on its way.
        hidden = hidden.contiguous().clone()
        self._marks.enter(Operation.SEND)
        if len(self._unfinished) == _MAX_UNFINISHED:
            self._wait(self._unfinished.popleft()[0], "send")
        self._unfinished.append((self._group.send([hidden], 1, 0), hidden))

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        hidden = torch.empty(shape, dtype=dtype, device=self._device)
        self._marks.enter(Operation.RECEIVE)
        self._wait(self._group.recv([hidden], 0, 0), "receive")
        return hidden

    def abort(self) -> None:
        """See Endable: kernels that wait on the GPU end, and with them whoever waits for the GPU."""
        threading.Thread(target=self._group.abort, name="link-abort", daemon=True).start()

    def close(self) -> None:
        last, self._group = [self._group, self._unfinished], None
        threading.Thread(target=last.clear, name="link-end", daemon=True).start()

    def _wait(self, work: Any, operation: str) -> None:
        """Has the current stream wait, not this thread."""
        try:
            work.wait()
        except RuntimeError as error:
            raise RankFailure(
                f"{operation} with rank {self._peer} of the neighbouring stage failed: {error}", self._peer
            ) from error
