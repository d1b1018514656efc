"""Collectives between CPU ranks of one host, through shared memory (engine/kernels/native/collectives.cpp)."""

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from engine.errors import RankFailure
from engine.kernels.native_library import native_library
from engine.parallel.collectives import ReceivedRows
from engine.parallel.memory_area import HEADER_BYTES, SharedArea, num_spins, share_area
from engine.progress import AxisMarks

_BUFFER_BYTES = 4 * 1024 * 1024
"""Of each of a rank's two; only what is used becomes resident."""
SPLIT_BYTES = 64 * 1024
"""Larger sums are divided among the ranks; below, each adds up everything, which takes one exchange instead of two."""
_LATE, _GONE = -1000, -2000
_ELEMENT_BYTES = {torch.float32: 4, torch.bfloat16: 2}


class _Group(ctypes.Structure):
    """struct Group of collectives.cpp."""

    _fields_ = (
        ("area", ctypes.c_void_p),
        ("buffer_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("num_spins", ctypes.c_int32),
        ("pidfds", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("done", ctypes.c_uint32),
        ("marks", ctypes.c_void_p),
    )


class SharedMemoryCollectives:
    """An axis whose ranks all run on this host. All ranks add in the order of ranks, so their sums are bitwise equal.

    A dead peer is noticed within 50 ms, a silent one after the timeout; both are named. The group is of no use then.
    """

    def __init__(
        self, library: ctypes.CDLL, area: SharedArea, rank: int, timeout_s: float, marks: AxisMarks | None = None
    ) -> None:
        self._library = library
        self._area = area
        self._timeout_s = timeout_s
        size = len(area.pidfds)
        self._pidfds = (ctypes.c_int32 * size)(*area.pidfds)
        self._group = _Group(
            area=ctypes.addressof(ctypes.c_char.from_buffer(area.memory, HEADER_BYTES)),
            buffer_bytes=_BUFFER_BYTES,
            rank=rank,
            size=size,
            num_spins=num_spins(size),
            pidfds=ctypes.addressof(self._pidfds),
            timeout_ns=int(timeout_s * 1e9),
            done=0,
            marks=None if marks is None else marks.address,
        )
        self._marks = marks
        self._handle = ctypes.byref(self._group)
        self.size, self.rank, self.split_bytes = size, rank, SPLIT_BYTES

    @classmethod
    def join(
        cls, store: dist.Store, rank: int, size: int, address: str, timeout_s: float, marks: AxisMarks | None = None
    ) -> Self | None:
        """Meet the other ranks of the axis through ``store``.

        Args:
            address: of this rank's host, as other hosts reach it.
            marks: where this rank's progress on the axis is noted.

        None, on all ranks alike, where they are on several hosts, cannot share memory, or lack the native library.
        Raises RuntimeError where they do not meet within ``timeout_s``.
        """
        library = native_library()
        can_share = library is not None and size <= library.remuda_max_ranks()
        num_bytes = _area_bytes(library, size) if library is not None and can_share else None
        area = share_area(dist.PrefixStore("shared-memory", store), rank, size, address, num_bytes, timeout_s)
        return None if library is None or area is None else cls(library, area, rank, timeout_s, marks)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        element_bytes = _ELEMENT_BYTES[tensor.dtype]
        self._call(
            self._library.remuda_all_reduce,
            "all-reduce",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_int64(tensor.numel()),
            element_bytes,
            ctypes.c_int64(SPLIT_BYTES),
        )
        return tensor

    def gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self._gather(tensor, is_receiver=self.rank == 0)

    def all_gather_last_dim(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = self._gather(tensor, is_receiver=True)
        assert gathered is not None
        return gathered

    def _gather(self, tensor: torch.Tensor, is_receiver: bool) -> torch.Tensor | None:
        tensor = tensor.contiguous()
        width = tensor.shape[-1]
        row_bytes = width * tensor.element_size()
        assert row_bytes <= _BUFFER_BYTES, f"a row of {row_bytes} bytes does not fit into {_BUFFER_BYTES}"
        output = tensor.new_empty(*tensor.shape[:-1], width * self.size) if is_receiver else None
        self._call(
            self._library.remuda_gather_rows,
            "gather",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_int64(tensor.numel() // width),
            ctypes.c_int64(row_bytes),
            ctypes.c_void_p(None if output is None else output.data_ptr()),
        )
        return output

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.contiguous()
        num_bytes = ctypes.c_int64(values.numel() * values.element_size())
        self._call(self._library.remuda_broadcast, "broadcast", ctypes.c_void_p(values.data_ptr()), num_bytes)
        return tensor if values is tensor else tensor.copy_(values)

    def post_rows(self, rows: torch.Tensor, counts: torch.Tensor, expected: torch.Tensor | None = None) -> ReceivedRows:
        rows = rows.contiguous()
        row_bytes = rows.shape[1] * rows.element_size()
        assert 0 < row_bytes <= _BUFFER_BYTES // 2, f"a row of {row_bytes} bytes does not fit into {_BUFFER_BYTES}"
        posted = ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(counts.data_ptr()), ctypes.c_int64(row_bytes)
        self._library.remuda_post_rows(self._handle, *posted)

        def wait() -> tuple[torch.Tensor, torch.Tensor]:
            received = torch.empty_like(counts)
            self._call(self._library.remuda_await_counts, "all-to-all", ctypes.c_void_p(received.data_ptr()))
            output = rows.new_empty(int(received.sum()), rows.shape[1])
            self._call(self._library.remuda_take_rows, "all-to-all", *posted, ctypes.c_void_p(output.data_ptr()))
            return output, received

        return wait

    def _call(self, function: Callable[..., int], operation: str, *arguments: Any) -> None:
        result = function(self._handle, *arguments)
        if result != 0:
            self.fail(result, operation)

    def abort(self) -> None:
        """See Endable: as if all other ranks had died."""
        self._area.abort()

    def close(self) -> None:
        self._area.close()

    @property
    def address(self) -> int:
        """Of the native group, for native code that calls collectives itself."""
        return ctypes.addressof(self._group)

    def fail(self, result: int, operation: str) -> NoReturn:
        """Raise what a native collective's ``result`` other than 0 means."""
        number = self._group.done
        if result <= _GONE:
            raise RankFailure(f"{operation} {number} failed: rank {_GONE - result} of the axis has died")
        raise RankFailure(
            f"{operation} {number} failed: rank {_LATE - result} of the axis did not reach it within "
            f"{self._timeout_s:g} s"
        )


def _area_bytes(library: ctypes.CDLL, size: int) -> int:
    function = library.remuda_area_bytes
    function.restype = ctypes.c_int64
    return int(function(size, ctypes.c_int64(_BUFFER_BYTES)))
