"""Hidden states between CPU ranks of one host, through shared memory (engine/kernels/native/stage_link.cpp)."""

import ctypes
from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist

from engine.errors import ProtocolViolation, RankFailure
from engine.kernels.native_library import native_library
from engine.parallel.memory_area import HEADER_BYTES, SharedArea, num_spins, share_area
from engine.progress import AxisMarks

_NUM_SLOTS = 16
_SLOT_BYTES = 4 * 1024 * 1024
"""Larger messages take several slots; only what is used becomes resident."""
_LATE, _GONE = -1, -2


class _Link(ctypes.Structure):
    """struct Link of stage_link.cpp."""

    _fields_ = (
        ("area", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("num_slots", ctypes.c_int32),
        ("num_spins", ctypes.c_int32),
        ("pidfd", ctypes.c_int32),
        ("done", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_int64),
        ("marks", ctypes.c_void_p),
    )


class SharedMemoryLink:
    """One direction: the pair's rank 0 sends, its rank 1 receives. See StageSender and StageReceiver.

    A dead peer is noticed within 50 ms, a silent one after the timeout; both are named by ``peer``, a global rank.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        area: SharedArea,
        rank: int,
        peer: int,
        timeout_s: float,
        marks: AxisMarks | None = None,
    ) -> None:
        self._library = library
        self._area = area
        self._peer = peer
        self._timeout_s = timeout_s
        self._link = _Link(
            area=ctypes.addressof(ctypes.c_char.from_buffer(area.memory, HEADER_BYTES)),
            slot_bytes=_SLOT_BYTES,
            num_slots=_NUM_SLOTS,
            num_spins=num_spins(2),
            pidfd=area.pidfds[1 - rank],
            done=0,
            timeout_ns=int(timeout_s * 1e9),
            marks=None if marks is None else marks.address,
        )
        self._marks = marks

    @classmethod
    def join(
        cls, store: dist.Store, rank: int, peer: int, address: str, timeout_s: float, marks: AxisMarks | None = None
    ) -> Self | None:
        """Meet the peer through ``store``, which is this pair's.

        Args:
            rank: 0 sends, 1 receives.
            peer: the other's global rank.
            address: of this rank's host, as other hosts reach it.
            marks: where this rank's progress on the link is noted.

        None, for both alike, where they cannot share memory. Raises RuntimeError where they do not meet in time.
        """
        library = native_library()
        num_bytes = None if library is None else _link_bytes(library)
        area = share_area(store, rank, 2, address, num_bytes, timeout_s)
        return None if library is None or area is None else cls(library, area, rank, peer, timeout_s, marks)

    def send(self, hidden: torch.Tensor) -> None:
        self._call(self._library.remuda_link_send, hidden.contiguous(), "took nothing")

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        hidden = torch.empty(shape, dtype=dtype)
        self._call(self._library.remuda_link_receive, hidden, "sent nothing")
        return hidden

    def abort(self) -> None:
        """See Endable: as if the peer had died."""
        self._area.abort()

    def close(self) -> None:
        self._area.close()

    def _call(self, function: Callable[..., int], hidden: torch.Tensor, complaint: str) -> None:
        num_bytes = ctypes.c_int64(hidden.numel() * hidden.element_size())
        result = function(ctypes.byref(self._link), ctypes.c_void_p(hidden.data_ptr()), num_bytes)
        if result == 0:
            return
        if result == _GONE:
            raise RankFailure(f"rank {self._peer} of the neighbouring stage has died", self._peer)
        if result == _LATE:
            raise RankFailure(
                f"rank {self._peer} of the neighbouring stage {complaint} for {self._timeout_s:g} s", self._peer
            )
        raise ProtocolViolation(f"rank {self._peer} sent hidden states of another size than {tuple(hidden.shape)}")


def _link_bytes(library: ctypes.CDLL) -> int:
    function = library.remuda_link_bytes
    function.restype = ctypes.c_int64
    return int(function(_NUM_SLOTS, ctypes.c_int64(_SLOT_BYTES)))
